"""Tensor descriptors, through which Hopper and later GPUs copy whole tiles (the Tensor Memory Accelerator, TMA)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Tile

FIRST_ARCH = 90
_ALIGNMENT = 16  # bytes: of the first element, of a row's length, of the innermost extent of a tile


def matrix(tensor: Tensor, block_row: int, block_column: int) -> TensorDescriptor | None:
    """Describes a row-major matrix in tiles; None where the hardware's rules do not allow it.

    The rules (CUDA driver API, cuTensorMapEncodeTiled): unit stride in a row, rows that do not overlap, rows and base
    aligned to 16 bytes, nothing empty, at most 256 elements a side.
    """
    size = tensor.element_size()
    stride = tensor.stride(0)
    strides_fit = tensor.stride(1) == 1 and stride >= tensor.shape[1] and stride * size % _ALIGNMENT == 0
    aligned = tensor.data_ptr() % _ALIGNMENT == 0
    blocks_fit = block_column * size >= _ALIGNMENT and max(block_row, block_column) <= 256
    if not (strides_fit and aligned and blocks_fit) or tensor.numel() == 0:
        return None
    return TensorDescriptor.from_tensor(tensor, [block_row, block_column])


def described(
    tile: Tile, arch: int | None, left: Tensor, left_block: tuple[int, int], right: Tensor, right_block: tuple[int, int]
) -> tuple[Any, Any, bool]:
    """Both operands as descriptors and True, or as they are and False where one of them cannot be described."""
    if tile.tma and (arch is None or arch >= FIRST_ARCH):
        left_ref, right_ref = matrix(left, *left_block), matrix(right, *right_block)
        if left_ref is not None and right_ref is not None:
            return left_ref, right_ref, True
    return left, right, False
