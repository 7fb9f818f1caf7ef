"""Pieces that several kernels share: conversions, dots and the dropout hash.

Triton's interpreter multiplies the raw bits of bfloat16 operands, truncates float32 to bfloat16 and converts
other types to it wrongly, all without an error. `convert` and `dot` work around that there, so that what is tested
on a CPU is what runs on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..reference import HASH_MULTIPLIER_1, HASH_MULTIPLIER_2, HASH_MULTIPLIER_3, LANE_MASK, SEED_OFFSET

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_MULTIPLIER_1 = tl.constexpr(HASH_MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(HASH_MULTIPLIER_2)
_MULTIPLIER_3 = tl.constexpr(HASH_MULTIPLIER_3)
_SEED_OFFSET = tl.constexpr(SEED_OFFSET)
_LANE_MASK = tl.constexpr(LANE_MASK)


@triton.jit
def convert(tile, dtype: tl.constexpr):
    """`tile` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = tile.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return tile.to(dtype)


@triton.jit
def dot(left, right, acc):
    """`acc + left @ right`, operands of one dtype, products exact, accumulated in the dtype of acc."""
    if INTERPRETED and left.dtype != tl.float64:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(left, right, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _mix(words, key_1, key_2):
    words = words * _MULTIPLIER_1 + key_1
    words = words ^ (words >> 15)
    words = words * _MULTIPLIER_2 + key_2
    words = words ^ (words >> 13)
    words = words * _MULTIPLIER_3
    return words ^ (words >> 16)


@triton.jit
def dropout_keys(seed_ptr):
    """The two int32 keys of a seed."""
    seed = tl.load(seed_ptr)
    low = seed.to(tl.int32)
    high = (seed >> 32).to(tl.int32)
    zero = tl.zeros_like(low)
    key_1 = _mix(low + _mix(high + _SEED_OFFSET, zero, zero), zero, zero)
    key_2 = _mix(high + _mix(low + _SEED_OFFSET, zero, zero), zero, zero)
    return key_1, key_2


@triton.jit
def keep_mask(key_1, key_2, offs_m, offs_k, words_per_row, threshold):
    """True where the elements (offs_m, offs_k), broadcast against each other, survive dropout."""
    words = offs_m * words_per_row + (offs_k >> 1)
    lanes = (_mix(words, key_1, key_2) >> ((offs_k & 1) * 16)) & _LANE_MASK
    return lanes >= threshold


@triton.jit
def load_tile(
    ref, stride_row, stride_column,  # [rows, columns]: a pointer, or a tensor descriptor where TMA
    row, column, rows, columns,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The tile whose first element is (row, column), zero outside the matrix."""
    if TMA:
        tile = ref.load([row, column])
    else:
        offs_row = row + tl.arange(0, BLOCK_ROW)[:, None]
        offs_column = column + tl.arange(0, BLOCK_COLUMN)[None, :]
        place = ref + offs_row.to(tl.int64) * stride_row + offs_column.to(tl.int64) * stride_column
        tile = tl.load(place, (offs_row < rows) & (offs_column < columns), other=0)
    return tile


@triton.jit
def store_tile(
    ref, stride_row, stride_column,  # [rows, columns]: a pointer, or a tensor descriptor where TMA
    row, column, rows, columns, tile,
    BLOCK_ROW: tl.constexpr, BLOCK_COLUMN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Writes what of `tile` lies inside the matrix."""
    if TMA:
        ref.store([row, column], tile)
    else:
        offs_row = row + tl.arange(0, BLOCK_ROW)[:, None]
        offs_column = column + tl.arange(0, BLOCK_COLUMN)[None, :]
        place = ref + offs_row.to(tl.int64) * stride_row + offs_column.to(tl.int64) * stride_column
        tl.store(place, tile, (offs_row < rows) & (offs_column < columns))


@triton.jit
def tile_place(tile, num_m, num_n, GROUP: tl.constexpr):
    """(pid_m, pid_n) of a tile: GROUP tiles of tokens share the tiles of the weight that pass through the cache."""
    per_group = GROUP * num_n
    first_m = (tile // per_group) * GROUP
    size_m = tl.minimum(num_m - first_m, GROUP)
    return first_m + (tile % per_group) % size_m, (tile % per_group) // size_m
