"""Quantising and merging weights, a block of rows at a time so that the extra memory stays small."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference

BLOCK_ELEMENTS = 1 << 18


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(w.shape, dtype=torch.int8)
    w_scale = torch.empty(w.shape[0], dtype=torch.float32)
    for rows in row_blocks(w):
        q[rows], w_scale[rows] = reference.quantize_rows(w[rows])
    return q, w_scale


def merge_rows(w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    merged = torch.empty_like(w)
    merged_scale = torch.empty(0 if w_scale is None else w.shape[0], dtype=torch.float32)
    for rows in row_blocks(w):
        block_scale = None if w_scale is None else w_scale[rows]
        merged[rows], new_scale = reference.merge_rows(w[rows], block_scale, a, b[rows], scale)
        if w_scale is not None:
            merged_scale[rows] = new_scale
    return merged, merged_scale


def row_blocks(w: Tensor) -> list[slice]:
    """Slices of rows with about `BLOCK_ELEMENTS` elements each."""
    step = max(1, BLOCK_ELEMENTS // max(1, w.shape[1]))
    return [slice(start, start + step) for start in range(0, w.shape[0], step)]
