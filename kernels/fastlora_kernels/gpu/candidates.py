"""The plans worth measuring for one size; `make kernels` compiles them, so that none fails on the GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from .descriptors import FIRST_ARCH
from .launch import next_block
from .plan import DECODE_TOKENS, FUSED_TOKENS, Plan, safe_plan
from .tiles import MAX_BLOCK_R, Tile, side_tile_by_rule, spread

_WHY = "candidate"
# Hopper: tiles of two warp groups at 128 x 256, one at half of that; fewer tokens take narrower ones.
_LARGE = (
    Tile(128, 256, 64, 8, 3, tma=True), Tile(256, 128, 64, 8, 3, tma=True), Tile(128, 128, 64, 8, 4, tma=True),
)  # fmt: skip
_MIDDLE = (
    Tile(128, 128, 64, 8, 4, tma=True), Tile(64, 128, 64, 4, 4, tma=True), Tile(64, 128, 64, 8, 4, tma=True),
    Tile(32, 64, 128, 4, 3, tma=True),
)  # fmt: skip
_DECODE = (Tile(16, 64, 128, 4, 4, tma=True), Tile(16, 64, 64, 4, 4, tma=True), Tile(16, 64, 64, 4, 4))
# Converting int8 in the product of the backward takes more registers.
_INT8_BACKWARD = (Tile(128, 128, 64, 8, 4, tma=True), Tile(64, 128, 64, 4, 4, tma=True))
# Triton waits for each product of int8 codes before the next, so a step of the sum is long, or two programs share a
# multiprocessor.
_INT8_CODES = (
    Tile(256, 128, 128, 8, 3, tma=True), Tile(128, 256, 128, 8, 3, tma=True), Tile(256, 128, 256, 8, 2, tma=True),
    Tile(128, 128, 128, 4, 3, tma=True), Tile(128, 128, 256, 8, 3, tma=True), Tile(64, 128, 128, 4, 4, tma=True),
)  # fmt: skip
_LARGE_TOKENS = 1024

# Kernels that read the activations once are as fast as memory where enough of it is on its way: 4.3 TB/s times about
# 700 ns are 3 MB, or 23 KB per multiprocessor. A tile of 64 x 64 has 8 KB, of which all stages but one are on their
# way; `splits` programs per multiprocessor add up. Against that, a tile of few tokens reads A more often from the L2
# cache, 2 R / block_m bytes per byte of x, and one of few features B, s or d_s, and writes more parts of sums.
_SHRINK = (
    Tile(64, 0, 64, 4, 4, splits=2), Tile(128, 0, 64, 8, 4, splits=2), Tile(128, 0, 64, 8, 4, splits=1),
    Tile(64, 0, 128, 8, 4, splits=2),
)  # fmt: skip
_SIDE = {
    # A group's masks take registers.
    "group_shrink": _SHRINK,
    "shrink": (*_SHRINK, Tile(128, 0, 128, 8, 3, splits=1), Tile(32, 0, 128, 4, 4, splits=4)),
    "output_reduce": (
        Tile(32, 256, 0, 8, 3, splits=2), Tile(32, 256, 0, 8, 4, splits=1), Tile(64, 128, 0, 8, 3, splits=2),
        Tile(64, 128, 0, 4, 4, splits=2), Tile(64, 256, 0, 8, 3, splits=1),
    ),
    "token_reduce": (
        Tile(64, 128, 0, 4, 3, splits=2), Tile(64, 128, 0, 4, 4, splits=2), Tile(64, 256, 0, 8, 3, splits=1),
        Tile(64, 256, 0, 8, 3, splits=2), Tile(32, 256, 0, 4, 4, splits=2), Tile(32, 128, 0, 4, 4, splits=4),
    ),
}  # fmt: skip


def candidates(
    arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float, op: str = "forward"
) -> list[Plan]:
    """Plans that `planned_forward` or `planned_backward` can run at this size, the safe one first.

    The arguments are those of `choose_plan`. On architectures before Hopper, or in float32, only the kind varies.
    """
    safe = safe_plan(arch, dtype, M, N, K, R, int8, p, op)
    hopper = dtype.itemsize == 2 and (arch is None or arch == FIRST_ARCH)
    if op == "int8":
        tiles = _INT8_CODES if hopper else ()
        return list(dict.fromkeys(Plan("int8", tile, _WHY) for tile in (safe.tile, *tiles)))
    plans = [safe, *(_of_kind(kind, arch, dtype, M, N, K, R, int8, p, op) for kind in _kinds(M, R, int8, op))]
    if hopper:
        plans += _hopper(M, R, int8, op)
    return list(dict.fromkeys(replace(plan, why=_WHY) for plan in plans))


def _kinds(M: int, R: int, int8: bool, op: str) -> Iterable[str]:
    yield from ("two_pass", "cublas")
    if int8:
        yield "scratch"
    if op == "forward" and M <= FUSED_TOKENS and next_block(R) <= MAX_BLOCK_R:
        yield "fused"


def _of_kind(
    kind: str, arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float, op: str
) -> Plan:
    """The kind with the tile that is safe for it."""
    tile = safe_plan(arch, dtype, max(M, DECODE_TOKENS + 1), N, K, R, int8, p, op).tile
    return Plan(kind, tile, _WHY)


def _hopper(M: int, R: int, int8: bool, op: str) -> Iterable[Plan]:
    large = M > _LARGE_TOKENS
    short = next_block(R) <= MAX_BLOCK_R
    if op == "forward" and M <= DECODE_TOKENS and short:
        for tile in _DECODE:
            yield from (Plan("decode", replace(tile, splits=splits), _WHY) for splits in (1, 2, 4, 8))
    tiles = _with_persistent(_LARGE) if large else _MIDDLE
    if op == "forward" and short and not large and M > DECODE_TOKENS:
        yield from (Plan("fused", tile, _WHY) for tile in _MIDDLE if tile.num_warps == 8 or tile.block_m == 32)
    converting = _with_persistent(_INT8_BACKWARD) if large else _INT8_BACKWARD
    yield from (Plan("two_pass", tile, _WHY) for tile in (converting if int8 and op == "backward" else tiles))
    if int8:
        yield from (Plan("scratch", tile, _WHY) for tile in tiles)


def _with_persistent(tiles: Iterable[Tile]) -> list[Tile]:
    """Each tile, and the same with one program per multiprocessor that walks over the product."""
    return [replace(tile, persistent=persistent) for tile in tiles for persistent in (False, True)]


def side_candidates(op: str, arch: int | None, dtype: torch.dtype, M: int, C: int, R: int) -> list[Tile]:
    """Tiles for the kernel `op` of `SIDE_OPS` at M tokens, C features and rank R, the safe one first.

    Their `splits` are programs per multiprocessor, as in a row of a table; `spread` makes no two of them equal.
    """
    tiles = [side_tile_by_rule(op, arch, dtype.itemsize, M, next_block(R))]
    if dtype.itemsize == 2 and arch == FIRST_ARCH and next_block(R) <= MAX_BLOCK_R and M > DECODE_TOKENS:
        tiles += _SIDE[op]
    return list({spread(op, tile, M, C): tile for tile in reversed(tiles)}.values())[::-1]
