"""Which kernels compute a LoRA linear, as data: picked from the tables, or by a rule that is safe anywhere."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from .launch import next_block
from .tables import row_for, tables_for
from .tiles import MAX_BLOCK_R, Tile, decode_tile, int8_tile, linear_tile, side_tile_by_rule, spread

DECODE_TOKENS = 16  # one tile of tokens
FUSED_TOKENS = 1024
_logger = logging.getLogger("fastlora.kernels")


@dataclass(frozen=True)
class Plan:
    """How to compute one LoRA linear.

    Args:
        kind: of the forward
            "decode": one launch, the sum over features shared by several programs; up to 16 tokens;
            "fused": one launch, `x A^T` beside `x W^T`;
            "two_pass": `s`, then a product whose accumulator also takes `s B^T`; an int8 weight converted in it;
            "scratch": two_pass over a dense copy of an int8 weight that lives for this call;
            "cublas": `bias + scale * s B^T`, onto which cuBLAS adds `x W^T`; an int8 weight through the scratch.
            "int8": codes of x and `s`, then a product of int8 codes.
            Of the backward: "two_pass", "scratch" or "cublas".
        tile: of the kernel that multiplies with the weight.
        why: where the choice comes from, in words.
    """

    kind: str
    tile: Tile
    why: str


@functools.lru_cache(maxsize=4096)
def choose_plan(
    arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float,
    op: str = "forward", gpu: str | None = None,
) -> Plan:  # fmt: skip
    """The plan for M tokens, N out_features, K in_features and rank R (0: no adapter) on sm_`arch`.

    Args:
        arch: compute capability as one number; None where no GPU runs.
        dtype: of the activations.
        int8: whether the frozen weight is int8.
        p: probability of dropout.
        op: "forward", "backward", or "int8" for the forward with codes of x.
        gpu: the GPU's name, which prefers its own table to another of its architecture.
    """
    if arch is not None:
        if not tables_for(arch, gpu):
            _say_unknown(arch)
        elif found := row_for(arch, gpu, op, dtype, M, N, K, R, int8, p):
            row, table = found
            return Plan(row.kind, row.tile, table.source())
    return safe_plan(arch, dtype, M, N, K, R, int8, p, op)


@functools.lru_cache(maxsize=4096)
def side_tile(
    op: str, arch: int | None, dtype: torch.dtype, M: int, C: int, R: int, p: float = 0.0, gpu: str | None = None
) -> Tile:
    """The tile of the kernel `op` of `SIDE_OPS` for M tokens with C features and rank R; see `choose_plan`."""
    found = None if arch is None else row_for(arch, gpu, op, dtype, M, C, C, R, False, p)
    tile = found[0].tile if found else side_tile_by_rule(op, arch, dtype.itemsize, M, next_block(R))
    return spread(op, tile, M, C)


@functools.cache
def _say_unknown(arch: int) -> None:
    _logger.info("no plans were tuned for sm_%d: safe ones are used", arch)


def safe_plan(
    arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float, op: str
) -> Plan:
    """A plan that compiles and fits on every architecture."""
    why = "safe default, not measured"
    # A rank that is summed in steps, or comes from another kernel, takes no registers beside the accumulator.
    tile = linear_tile(arch, dtype.itemsize, M, min(next_block(R), MAX_BLOCK_R))
    if op == "int8":
        return Plan("int8", int8_tile(arch, dtype.itemsize), why)
    if op == "forward" and M <= DECODE_TOKENS and next_block(R) <= MAX_BLOCK_R:
        return Plan("decode", decode_tile(arch, dtype.itemsize, N, K, next_block(R)), why)
    if dtype == torch.float32 or (R == 0 and not int8):
        return Plan("cublas", tile, f"{why}; without a tensor-core product of ours to gain from")
    if op == "forward" and p == 0 and M <= FUSED_TOKENS and next_block(R) <= MAX_BLOCK_R:
        return Plan("fused", tile, why)
    return Plan("scratch" if int8 and M > FUSED_TOKENS else "two_pass", tile, why)
