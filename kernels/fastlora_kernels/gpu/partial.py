"""Sums over several programs in a fixed order: each stores its part, the last to arrive adds all of them.

Which program arrives last varies, the order of the sum does not, so the same inputs give the same bits. The only
atomic is the count of arrivals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import convert
from .launch import cdiv, next_block

RESERVED = 1 << 20  # counters for captured calls; one call takes about a hundred
_counters: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, Tensor] = {}
_taken: dict[torch.device, int] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros; every kernel that counts with them leaves zeros behind.

    They are kept per stream, on which kernels follow one another. A CUDA graph may run on another stream than the
    one it was captured on, so each captured call gets its own for good; only where no more of them are left, or the
    first call of all is a captured one, does a graph zero them at each of its runs.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _reserved(count, device)
    if device not in _reserves:
        _reserves[device] = torch.zeros(RESERVED, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # once: a graph's stream will not wait for it
    key = device, torch.cuda.current_stream(device).cuda_stream
    kept = _counters.get(key)
    if kept is None or kept.numel() < count:
        kept = _counters[key] = torch.zeros(next_block(count, 1024), dtype=torch.int32, device=device)
    return kept


def _reserved(count: int, device: torch.device) -> Tensor:
    """Counters that no other call has had."""
    reserve, first = _reserves.get(device), _taken.get(device, 0)
    if reserve is None or first + count > reserve.numel():
        return torch.zeros(count, dtype=torch.int32, device=device)
    _taken[device] = cdiv(first + count, 32) * 32  # aligned, since Triton compiles anew for what is not
    return reserve[first : first + count]


@triton.jit
def arrives_last(counter_ptr, programs):
    """Whether this is the last of `programs` to come here; what the others stored before is then visible."""
    tl.debug_barrier()  # every thread of this program has stored its part
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_of_parts(part_tile, stride_part, parts, mask, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """float32 `[ROWS, COLUMNS]`: the sum of `parts` tiles, first to last."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(parts):
        # Past the first-level cache, which other processors' stores do not reach.
        total += tl.load(part_tile, mask, other=0.0, cache_modifier=".cg")
        part_tile += stride_part
    return total


@triton.jit
def store_sum(
    out_tile, acc, scale, mask,  # [ROWS, COLUMNS]
    part_ptr, places, stride_part,  # [parts, ...] float32 and where in a part the tile lies, where SHARED
    part, parts, counter_ptr,
    SHARED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Stores `scale * acc`, or where SHARED the same of the sum of what `parts` programs have in `acc`."""
    if SHARED:
        part_tile = part_ptr + places
        tl.store(part_tile + part.to(tl.int64) * stride_part, acc, mask)
        if arrives_last(counter_ptr, parts):
            acc = sum_of_parts(part_tile, stride_part, parts, mask, ROWS, COLUMNS)
            tl.store(out_tile, convert(acc * scale, out_tile.dtype.element_ty), mask)
    else:
        tl.store(out_tile, convert(acc * scale, out_tile.dtype.element_ty), mask)
