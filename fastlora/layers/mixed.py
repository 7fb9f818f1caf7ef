"""One adapter per row of a batch, or none.

    y_row = W x_row + bias + s_e B_e A_e x_row    where e is the row's adapter

`ops.lora_linear_mixed` computes it for adapters of one dropout probability. Those of another are added here, stacked
and padded with zeros to one rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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

    def among(self, names: list[str]) -> Tensor:
        """The rows as indices into some of the names; -1 for the other adapters, too."""
        if len(names) == len(self.adapters):
            return self.rows
        # The last element, which -1 picks, stands for no adapter.
        lookup = [names.index(name) if name in names else -1 for name in (*self.adapters, None)]
        return self.rows.new_tensor(lookup)[self.rows]


def add_low_rank(y: Tensor, x: Tensor, rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`y_row + B_e A_e x_row`.

    Args:
        y: `[..., N]`, x: `[..., K]`, whose leading axes hold the batch's rows one after another.
        rows: int64 `[B]`, indices into the first axis of a and b, or -1.
        a: `[E, R, K]`, b: `[E, N, R]`.

    Raises:
        ValueError: x has a number of tokens that the rows do not divide.
    """
    B, M = rows.shape[0], x.numel() // x.shape[-1]
    if M % B:
        raise ValueError(f"mixed: expected a batch of {B} rows, as adapters were given for, found {M} tokens")
    rows = rows.to(x.device)
    chosen, on = rows.clamp_min(0), (rows >= 0).to(x.dtype)
    s = torch.bmm(x.reshape(B, M // B, -1), a.to(x.dtype)[chosen].transpose(1, 2)) * on[:, None, None]
    added = torch.baddbmm(y.reshape(B, M // B, -1), s, b.to(x.dtype)[chosen].transpose(1, 2))
    return added.view(y.shape)


def add_rows(y: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """`y_row + v_e` for vectors `[E + 1, N]`, the first of which belongs to rows without an adapter."""
    added = vectors.to(y.dtype)[rows + 1][:, None]
    return (y.reshape(rows.shape[0], -1, y.shape[-1]) + added).view(y.shape)


def stacked(tensors: list[Tensor], rank_axis: int) -> Tensor:
    """Tensors of adapters as one, with zeros behind those of a lower rank."""
    rank = max(tensor.shape[rank_axis] for tensor in tensors)
    padding = [(0, 0, 0, rank - t.shape[0]) if rank_axis == 0 else (0, rank - t.shape[1]) for t in tensors]
    return torch.stack([F.pad(tensor, pad) for tensor, pad in zip(tensors, padding, strict=True)])
