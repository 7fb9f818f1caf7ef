"""Which tile a kernel runs with, by architecture, dtype, number of tokens and rank.

These are safe tiles, not tuned ones: they compile without spills and within the shared memory of every supported
architecture, which `make kernels` checks. An unknown architecture gets the smallest shared memory's tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from .launch import cdiv

MAX_RANK = 256
MAX_BLOCK_R = 64  # a longer rank is summed in steps of this
LARGE_SHARED_MEMORY = {80, 90, 100}  # at least 160 KB per block; the others have 99 KB
SPAN = 256  # tokens whose d_s is summed at a time
SIDE_OPS = ("shrink", "group_shrink", "output_reduce", "token_reduce")  # kernels beside the product with the weight
MULTIPROCESSORS = 132  # of an H100 or H200; assumed where no GPU can be asked


@dataclass(frozen=True)
class Tile:
    """Block sizes and compiler options.

    Args:
        block_m, block_n, block_c: tokens, output features, and the axis that the kernel sums over.
        num_warps, num_stages: as Triton means them.
        tma: loads whole tiles through tensor descriptors where the strides allow it, else through pointers.
        persistent: one program per multiprocessor walks over the tiles.
        splits: programs that share the sum of one tile; in `output_reduce`, spans in a slice. In a row of a table for a
            kernel of `SIDE_OPS`, programs per multiprocessor, of which `spread` makes the former for a size.
    """

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    tma: bool = False
    persistent: bool = False
    splits: int = 1


def programs(tile: Tile, tiles: int, device: torch.device) -> tuple[int, ...]:
    """The grid of a kernel that walks over `tiles`."""
    return (min(tiles, multiprocessors(device)) if tile.persistent else tiles,)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _fitted(tile: Tile, arch: int | None, itemsize: int) -> Tile:
    """Half the depth for float32 operands, two stages where shared memory is small."""
    block_c = max(16, tile.block_c * 2 // max(itemsize, 2))
    stages = tile.num_stages if arch in LARGE_SHARED_MEMORY else min(tile.num_stages, 2)
    return Tile(tile.block_m, tile.block_n, block_c, tile.num_warps, stages, splits=tile.splits)


def linear_tile(arch: int | None, itemsize: int, tokens: int, block_r: int) -> Tile:
    """For the kernels that produce y or d_x: block_n output features, block_m tokens, block_c contracted."""
    few = tokens <= 16
    if block_r >= 256:
        tile = Tile(16, 32, 32, 8, 2)
    elif block_r >= 128:
        tile = Tile(16, 64, 32, 4, 2) if few else Tile(32, 64, 32, 8, 2)
    elif block_r >= 64:
        tile = Tile(16 if few else 32, 64, 64, 4, 2)
    elif few:
        tile = Tile(16, 64, 64 if arch in LARGE_SHARED_MEMORY else 32, 4, 3)
    elif arch == 100:
        tile = Tile(64, 64, 64, 8, 2)
    elif arch in LARGE_SHARED_MEMORY:
        tile = Tile(64, 64, 64, 4, 3)
    else:
        tile = Tile(64, 64, 32, 4, 2) if arch == 120 else Tile(32, 64, 64, 4, 2)
    return _fitted(tile, arch, itemsize)


def decode_tile(arch: int | None, itemsize: int, features_out: int, features_in: int, block_r: int) -> Tile:
    """For one tile of tokens: as `linear_tile`, split until there are two programs per multiprocessor."""
    tile = linear_tile(arch, itemsize, 1, block_r)
    if block_r >= 64 and arch not in LARGE_SHARED_MEMORY:
        tile = replace(tile, block_c=tile.block_c // 2)  # spills otherwise
    splits = min(2 * MULTIPROCESSORS // cdiv(features_out, tile.block_n), features_in // (4 * tile.block_c), 16)
    return replace(tile, splits=_power_of_two(max(splits, 1)))


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)


def side_tile_by_rule(op: str, arch: int | None, itemsize: int, tokens: int, block_r: int) -> Tile:
    """For the kernel `op` of `SIDE_OPS`; its `splits` are programs per multiprocessor."""
    if op in ("shrink", "group_shrink"):  # block_m tokens, block_c features at a time
        block_m = 16 if tokens <= 16 or block_r >= 256 else 32
        tile = Tile(block_m, 0, 32 if block_r >= 128 else 64, 8 if arch == 100 else 4, 2)
    elif op == "token_reduce":  # block_m tokens at a time, block_n features
        tile = Tile(32, 32 if block_r >= 128 else 64, 0, 4, 2, splits=2)
    elif block_r >= 256:  # output_reduce, the same
        return Tile(32, 32, 0, 8, 2, splits=2)
    elif arch == 100 and itemsize == 2:
        return Tile(32, 64, 0, 8, 2, splits=2)
    elif block_r >= 64 or itemsize > 2:
        return Tile(16, 64, 0, 8, 2, splits=2)
    else:
        return Tile(16, 128, 0, 4, 2, splits=2)
    return _fitted(tile, arch, itemsize)


def spread(op: str, tile: Tile, tokens: int, features: int) -> Tile:
    """`tile` with the sums shared so that about `tile.splits` programs run per multiprocessor."""
    programs, tokens = tile.splits * MULTIPROCESSORS, max(tokens, 1)
    if op in ("shrink", "group_shrink"):
        splits = min(programs // cdiv(tokens, tile.block_m), features // 512, 16)
        return replace(tile, splits=_power_of_two(max(splits, 1)))
    slices = max(1, programs // cdiv(features, tile.block_n))
    if op == "token_reduce":
        return replace(tile, splits=min(slices, cdiv(tokens, 512)))
    spans = cdiv(tokens, SPAN)
    return replace(tile, splits=cdiv(spans, min(slices, spans)))


def quantize_shrink_tile(arch: int | None, itemsize: int, block_r: int) -> Tile:
    """For the codes of block_m tokens, block_c features at a time."""
    return _fitted(Tile(16, 0, 32 if block_r >= 128 else 128, 4, 2), arch, itemsize)


def int8_tile(arch: int | None, itemsize: int) -> Tile:
    """For the product of int8 codes: block_m tokens, block_n output features, block_c contracted."""
    if itemsize > 2:
        return Tile(32, 64, 64, 4, 2)  # the low-rank part is a product in float32
    if arch == 90:
        return Tile(256, 128, 128, 8, 3, tma=True)
    return Tile(64, 128, 64, 4, 3 if arch in LARGE_SHARED_MEMORY else 2)


def merge_tile() -> Tile:
    """For `merge_rows`: block_n rows of W, block_c columns at a time."""
    return Tile(0, 16, 64, 8, 1)
