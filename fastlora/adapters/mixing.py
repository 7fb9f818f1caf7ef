"""Batches whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..layers.mixed import Mix
from . import trained
from .registry import check_known, check_unmerged, patched_layers


@contextmanager
def mixed(
    model: nn.Module, rows: Sequence[str | None] | Tensor, adapters_of_rows: Sequence[str] | None = None
) -> Iterator[None]:
    """One adapter per row of the batch, or none, inside a `with` block; in training as in inference.

    Where activations are recomputed in the backward, that has to run inside the block too.

    Args:
        rows: a name or None per row; or int64 indices into `adapters_of_rows`, with -1 for none.
        adapters_of_rows: the names that rows may use, by default those that they do. Code compiled for one set of
            names serves any choice of rows among them.

    Raises:
        ValueError: an unknown adapter, no rows, an index out of range, or an adapter that cannot be mixed: one with
            DoRA, or with modules or biases of its own.
    """
    mix = _make_mix(model, rows, adapters_of_rows)
    try:
        set_mix(model, mix)
        yield
    finally:
        set_mix(model, None)


def mix_rows(model: nn.Module, rows: Tensor, names: Sequence[str]) -> None:
    """What `mixed` does at the beginning of its block; `set_mix(model, None)` is what it does at the end."""
    set_mix(model, _make_mix(model, rows, names))


def set_mix(model: nn.Module, mix: Mix | None) -> None:
    for layer in patched_layers(model).values():
        layer.mix_adapters(mix)


def _make_mix(model: nn.Module, rows: Sequence[str | None] | Tensor, names: Sequence[str] | None) -> Mix:
    if isinstance(rows, Tensor):
        if names is None or rows.dim() != 1 or rows.is_floating_point():
            raise ValueError("rows: expected names, or a one-dimensional tensor of indices with adapters_of_rows")
        if rows.numel() and (rows.min() < -1 or rows.max() >= len(names)):
            raise ValueError(f"rows: expected indices from -1 to {len(names) - 1}, found {rows.min()} to {rows.max()}")
    else:
        names = sorted({name for name in rows if name is not None}) if names is None else names
        for name in rows:
            if name is not None and name not in names:
                raise ValueError(f"rows: expected adapters of {list(names)} or None, found {name!r}")
        rows = torch.tensor([-1 if name is None else list(names).index(name) for name in rows], dtype=torch.int64)
    if not rows.numel():
        raise ValueError("rows: expected one per row of the batch, found none")
    for name in names:
        check_known(model, name)
        if trained.copies_of(model, name):
            raise ValueError(f"rows: expected adapters without trained modules or biases of their own, found {name!r}")
    check_unmerged(model)
    return Mix(tuple(names), rows)
