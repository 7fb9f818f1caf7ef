"""Quantising and merging weights, a tile at a time so that the extra memory stays small and in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference

BLOCK_ELEMENTS = 1 << 18
# Of a float64 sum: 1 MiB. Fewer rows or columns make the matrix product slow, more leave the cache.
TILE_ROWS = 128
TILE_COLUMNS = 1024


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(w.shape, dtype=torch.int8)
    w_scale = torch.empty(w.shape[0], dtype=torch.float32)
    for rows in _blocks(w.shape[0], max(1, BLOCK_ELEMENTS // max(1, w.shape[1]))):
        q[rows], w_scale[rows] = reference.quantize_rows(w[rows])
    return q, w_scale


def merge_rows(w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if w_scale is not None:
        return _merge_int8(w, w_scale, a.double(), b.double(), scale)
    if w.stride(0) < w.stride(1):  # one that is stored as [K, N] is read row after row, too
        return _merge_dense(w.T, b.T.double(), a.T.double(), scale).T, torch.empty(0)
    return _merge_dense(w, a.double(), b.double(), scale), torch.empty(0)


def _merge_dense(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    merged = torch.empty_like(w)
    buffer = torch.empty(TILE_ROWS * TILE_COLUMNS, dtype=torch.float64)
    for columns in _blocks(w.shape[1], TILE_COLUMNS):
        for rows in _blocks(w.shape[0], TILE_ROWS):
            tile = w[rows, columns]
            total = buffer[: tile.numel()].view(tile.shape)
            merged[rows, columns] = _added(total.copy_(tile), a[:, columns], b[rows], scale)
    return merged


def _added(total: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Adds `scale * b @ a` in float64, in place, with what the reference rounds rounded too."""
    if abs(math.frexp(scale)[0]) == 0.5:  # a power of two rounds nothing, so that one pass does it all
        return total.addmm_(b, a, alpha=scale)
    return total.add_((b @ a).mul_(scale))


def _merge_int8(w: Tensor, w_scale: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    merged, merged_scale = torch.empty_like(w), torch.empty(w.shape[0], dtype=torch.float32)
    step = max(8, TILE_ROWS * TILE_COLUMNS // max(1, w.shape[1]))
    for rows in _blocks(w.shape[0], step):  # whole ones, which share a scale
        total = w[rows].double().mul_(w_scale[rows].double()[:, None])
        merged[rows], merged_scale[rows] = reference.quantize_rows(_added(total, a, b[rows], scale).float())
    return merged, merged_scale


def _blocks(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]
