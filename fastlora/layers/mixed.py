"""One adapter per row of a batch, or none.

y_row = W x_row + bias + s_e B_e A_e x_row    where e is the row's adapter
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """Which of some adapters each row of the batch uses.

    Attributes:
        adapters: names.
        rows: int64 `[B]`, an index into the names, or -1 for none.
    """

    adapters: tuple[str, ...]
    rows: Tensor
    _among: dict[tuple[tuple[str, ...], torch.device], Mix] = field(default_factory=dict, repr=False, compare=False)

    def among(self, names: tuple[str, ...], device: torch.device) -> Mix:
        """The mix where only some of the names are adapters, on a device; layers with the same ones share it."""
        if (names, device) not in self._among:
            # The last element, which -1 picks, stands for no adapter.
            lookup = torch.tensor([names.index(name) if name in names else -1 for name in (*self.adapters, None)])
            self._among[names, device] = Mix(names, lookup[self.rows.cpu()].to(device))
        return self._among[names, device]

    @cached_property
    def runs(self) -> tuple[tuple[str | None, slice], ...]:
        """Neighbouring rows with one adapter, which the host has to know: it waits for the device, once per mix."""
        found, first = [], 0
        for index, rows in groupby(self.rows.tolist()):
            last = first + len(list(rows))
            found.append((None if index < 0 else self.adapters[index], slice(first, last)))
            first = last
        return tuple(found)


def add_rows(y: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """`y_row + v_e` for vectors `[E + 1, N]`, the first of which belongs to rows without an adapter."""
    added = vectors.to(y.dtype)[rows + 1][:, None]
    return (y.reshape(rows.shape[0], -1, y.shape[-1]) + added).view(y.shape)
