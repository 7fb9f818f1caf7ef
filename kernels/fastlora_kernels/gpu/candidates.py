"""The plans worth measuring for one size; `make kernels` compiles them, so that none fails on the GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from .descriptors import FIRST_ARCH
from .launch import next_block
from .plan import DECODE_TOKENS, FUSED_TOKENS, Plan, safe_plan
from .tiles import MAX_BLOCK_R, Tile

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
_LARGE_TOKENS = 1024


def candidates(
    arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float, op: str = "forward"
) -> list[Plan]:
    """Plans that `planned_forward` or `planned_backward` can run at this size, the safe one first.

    The arguments are those of `choose_plan`. On architectures before Hopper, or in float32, only the kind varies.
    """
    safe = safe_plan(arch, dtype, M, N, K, R, int8, p, op)
    plans = [safe, *(_of_kind(kind, arch, dtype, M, N, K, R, int8, p, op) for kind in _kinds(M, R, int8, op))]
    if dtype.itemsize == 2 and (arch is None or arch == FIRST_ARCH):
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
    tiles = _LARGE if large else _MIDDLE
    if op == "forward" and short and not large and M > DECODE_TOKENS:
        yield from (Plan("fused", tile, _WHY) for tile in _MIDDLE if tile.num_warps == 8 or tile.block_m == 32)
    yield from (Plan("two_pass", tile, _WHY) for tile in (_INT8_BACKWARD if int8 and op == "backward" else tiles))
    if int8:
        yield from (Plan("scratch", tile, _WHY) for tile in tiles)
