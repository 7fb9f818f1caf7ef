"""`lora_linear_mixed` and its backward: the frozen layer for all tokens, then each run of rows with its own adapter.

Neighbouring rows of one adapter are one slice of x, so that nothing is gathered, padded or computed for another row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop_, dropped, keep_bits
from .linear import as_dtype, frozen, gradients
from .plan import FEW_TOKENS, product_dtype


def lora_linear_mixed(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    rows: Tensor,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    M, K = x.shape
    wide = as_dtype(x, product_dtype(x.dtype))
    y = frozen(x, wide, w, w_scale, bias)
    if M <= FEW_TOKENS:
        wide, y = as_dtype(wide, torch.float32), as_dtype(y, torch.float32)
    if p > 0 and seed is not None:
        wide = dropped(wide, keep_bits(seed, M, K, p))
    for adapter, tokens, part in _runs(rows, ranks, M):
        s = F.linear(wide[tokens], as_dtype(a[part] / (1 - p), wide.dtype))
        y[tokens].addmm_(s, as_dtype(b[:, part], wide.dtype).T, alpha=scales[adapter])
    return as_dtype(y, x.dtype)


def _runs(rows: Tensor, ranks: Sequence[int], tokens: int) -> Iterator[tuple[int, slice, slice]]:
    """The adapter of each run of equal rows, the run's tokens, and the adapter's part of the ranks."""
    per_row, first = tokens // rows.shape[0], 0
    ends = list(accumulate(ranks))
    for adapter, run in groupby(rows.tolist()):
        last = first + per_row * len(list(run))
        if 0 <= adapter < len(ranks) and last > first:
            yield adapter, slice(first, last), slice(ends[adapter] - ranks[adapter], ends[adapter])
        first = last


def lora_linear_mixed_backward(
    d_y: Tensor,
    x: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    rows: Tensor,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    narrow, wide = d_y.dtype, product_dtype(d_y.dtype)
    d_y, M = as_dtype(d_y, wide), d_y.shape[0]
    d_x, _, _ = gradients(d_y, None, None, None, w, w_scale, None, None, 1.0, 0.0, None, needs_x, False, False)
    d_a = torch.zeros(a.shape if needs_a else 0, dtype=wide)
    d_b = torch.zeros(b.shape if needs_b else 0, dtype=wide)
    keep = keep_bits(seed, M, w.shape[1], p) if p > 0 and seed is not None else None
    if x is not None:
        x = as_dtype(x, wide) if keep is None else dropped(as_dtype(x, wide), keep)
    for adapter, tokens, part in _runs(rows, ranks, M):
        own_a, own_b = a[part] / (1 - p), as_dtype(b[:, part], wide)
        if needs_b and x is not None:
            d_b[:, part] += scales[adapter] * (d_y[tokens].T @ F.linear(x[tokens], as_dtype(own_a, wide)))
        d_s = scales[adapter] * (d_y[tokens] @ own_b)
        if needs_a and x is not None:
            d_a[part] += d_s.T @ x[tokens] / (1 - p)
        if d_x is not None:
            added = d_s @ as_dtype(own_a, wide)
            d_x[tokens] += added if keep is None else drop_(added, keep[tokens])
    d_x = w.new_empty(0, dtype=narrow) if d_x is None else as_dtype(d_x, narrow)
    return d_x, as_dtype(d_a, a.dtype), as_dtype(d_b, b.dtype)
