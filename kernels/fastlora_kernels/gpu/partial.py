"""Sums over several programs in a fixed order: each stores its part, the last to arrive adds all of them.

Which program arrives last varies, the order of the sum does not, so the same inputs give the same bits. The only
atomic is the count of arrivals.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DEFAULT_STREAM = 0  # its handle
_counters: dict[torch.device, Tensor] = {}


def counters(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 zeros; every kernel that counts with them leaves zeros behind.

    They are kept for the default stream alone, on which kernels follow one another. On any other, a CUDA graph may be
    in the making: it may run later on a stream of its choice, and while torch.compile warms up for one, memory comes
    from a pool in which nothing but results may remain. There each call gets, and zeroes, its own.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device).cuda_stream != DEFAULT_STREAM:
        return torch.zeros(count, dtype=torch.int32, device=device)
    kept = _counters.get(device)
    if kept is None or kept.numel() < count:
        size = max(1024, triton.next_power_of_2(count))
        kept = _counters[device] = torch.zeros(size, dtype=torch.int32, device=device)
    return kept


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
