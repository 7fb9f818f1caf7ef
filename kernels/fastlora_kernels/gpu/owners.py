"""Which adapter computes for which token, where each row of a batch has its own adapter, or none.

Tokens of a row follow one another, so most tiles of tokens have one owner. A and B hold the ranks of all adapters side
by side; s is compact, with the ranks of each token's own adapter from column 0. A kernel reads the owners from `rows`
as they are on the GPU: nothing is sorted, gathered or known to the host. Number E stands for no adapter: it has no
ranks, and so takes no work and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .launch import MOST_REGISTERS, cdiv, next_block
from .tiles import MAX_BLOCK_R

FEW_TOKENS = 64  # of a batch that small tiles serve
SMALL_BLOCK_R = 16  # ranks at a time; more spill registers in large tiles and in the backward
MOST_KEPT = 1024  # sets of adapters whose numbers stay on the device
_ROWS_AT_ONCE = tl.constexpr(128)


@dataclass(frozen=True)
class Adapters:
    """What adapters of one mix are, on the device; the last entry of each is that of no adapter.

    Args:
        first: int32 `[E + 2]`, where each adapter's ranks begin and the one before it ends.
        scale, inverse_keep: float32 `[E + 1]`, the factor of `B A` and `1 / (1 - p)`.
        threshold: int32 `[E + 1]`, as `drop_threshold` gives it.
    """

    first: Tensor
    scale: Tensor
    inverse_keep: Tensor
    threshold: Tensor


_kept: dict[Any, Adapters] = {}


@dataclass(frozen=True)
class Owners:
    """The adapters of a mix and the rows of the batch that have them.

    Args:
        rows: integers `[B]` on the device; one that is no adapter's number stands for none.
        row_tokens: tokens of each row.
        ranks: of the adapters.
        adapters: their numbers on the device.
    """

    rows: Tensor
    row_tokens: int
    ranks: tuple[int, ...]
    adapters: Adapters

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.ranks)

    @property
    def block_r(self) -> int:
        """Ranks that the forward's product takes at a time: in a small batch those of several adapters."""
        if self.row_tokens * self.rows.shape[0] > FEW_TOKENS:
            return SMALL_BLOCK_R
        return MAX_BLOCK_R if len(self.ranks) > 1 else min(next_block(self.rank), MAX_BLOCK_R)

    def slices(self, tokens: int) -> int:
        """Slices of at most so many tokens, none of which has tokens of two rows."""
        return self.rows.shape[0] * cdiv(self.row_tokens, tokens)


def owners_of(rows: Tensor, tokens: int, ranks: Sequence[int], scales: Sequence[float], ps: Sequence[float]) -> Owners:
    """The owners of so many tokens; the adapters' numbers are written to the device once, not per call."""
    inputs = tuple(ranks), tuple(scales), tuple(ps), rows.device
    adapters = _kept.get(inputs)
    if adapters is None:
        adapters = _adapters(*inputs)
        on_cuda = rows.device.type == "cuda"
        # What is written while a CUDA graph is captured is there when the graph runs, not before.
        if not (on_cuda and torch.cuda.is_current_stream_capturing()):
            if on_cuda:
                torch.cuda.current_stream(rows.device).synchronize()  # other streams will read it
            if len(_kept) == MOST_KEPT:
                _kept.clear()
            _kept[inputs] = adapters
    return Owners(rows, tokens // rows.shape[0], inputs[0], adapters)


def _adapters(
    ranks: tuple[int, ...], scales: tuple[float, ...], ps: tuple[float, ...], device: torch.device
) -> Adapters:
    first = [sum(ranks[:i]) for i in range(len(ranks) + 1)]
    return Adapters(
        _written([*first, first[-1]], torch.int32, device), _written([*scales, 0.0], torch.float32, device),
        _written([*(1.0 / (1.0 - p) for p in ps), 0.0], torch.float32, device),
        _written([*(drop_threshold(p) for p in ps), 0], torch.int32, device),
    )  # fmt: skip


def _written(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Written by the device, one number at a time, as a capture allows."""
    with torch.inference_mode(False):  # a tensor made in inference mode stays one
        tensor = torch.empty(len(values), dtype=dtype, device=device)
        for place, value in zip(tensor.unbind(), values, strict=True):
            place.fill_(value)
    return tensor


def mixed_arguments(owners: Owners | None) -> dict[str, Any]:
    """What a kernel needs to know whose tokens are whose; None where there is one adapter for all.

    Left to itself, ptxas spills a few registers of these kernels so that more blocks may run at once.
    """
    if owners is None:
        return dict(rows_ptr=None, first_ptr=None, E=0, row_tokens=0)
    first, E = owners.adapters.first, len(owners.ranks)
    return dict(rows_ptr=owners.rows, first_ptr=first, E=E, row_tokens=owners.row_tokens, maxnreg=MOST_REGISTERS)


def rank_span(R: int, block_r: int, owners: Owners | None) -> int:
    """The ranks of one adapter in whole blocks; of several the kernel finds out, and one compilation serves all."""
    return cdiv(R, block_r) * block_r if owners is None else 0


@triton.jit
def owner_of(rows_ptr, row, inside, E):
    """The adapters of rows of the batch, E where there is none."""
    adapter = tl.load(rows_ptr + row, inside, other=-1)
    return tl.where((adapter >= 0) & (adapter < E), adapter, E).to(tl.int32)


@triton.jit
def token_owners(rows_ptr, first_m, M, E, row_tokens, BLOCK_M: tl.constexpr):
    """int32 `[BLOCK_M]`: the adapters of a tile's tokens."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    return owner_of(rows_ptr, offs_m // row_tokens, offs_m < M, E)


@triton.jit
def slice_of_row(index, slice_tokens, row_tokens):
    """The row that a slice is of, its first token, and the end of the slice."""
    slices = tl.cdiv(row_tokens, slice_tokens)
    row = index // slices
    first_m = row * row_tokens + (index % slices) * slice_tokens
    return row, first_m, tl.minimum(first_m + slice_tokens, (row + 1) * row_tokens)


@triton.jit
def arrivals(rows_ptr, adapter, slices, B, E):
    """How many slices are of an adapter's rows, each row having `slices`."""
    count = 0
    for first in range(0, B, _ROWS_AT_ONCE):
        rows = first + tl.arange(0, _ROWS_AT_ONCE)
        own = (owner_of(rows_ptr, rows, rows < B, E) == adapter) & (rows < B)
        count += tl.sum(own.to(tl.int32), 0)
    return count * slices


@triton.jit
def sum_of_own_parts(
    part_tile, stride_part, rows_ptr, adapter, slices, B, E, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """float32 `[ROWS, COLUMNS]`: the sum of the parts of an adapter's rows, first to last, as `sum_of_parts` has it."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    step = tl.zeros((1, 1), tl.int64) + stride_part
    for row in range(0, B):
        own_tile = part_tile
        for _ in range(0, tl.where(owner_of(rows_ptr, row, True, E) == adapter, slices, 0)):
            total += tl.load(own_tile, mask, other=0.0, cache_modifier=".cg")
            own_tile += step
        part_tile += step * slices
    return total
