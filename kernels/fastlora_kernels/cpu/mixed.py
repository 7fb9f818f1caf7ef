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
    ps: Sequence[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    M, dtype = x.shape[0], x.dtype
    wide = as_dtype(x, product_dtype(dtype))
    y = frozen(x, wide, w, w_scale, bias)
    if M <= FEW_TOKENS:
        wide, y = as_dtype(wide, torch.float32), as_dtype(y, torch.float32)
    all_s = torch.zeros(M, max(ranks), dtype=dtype)
    for adapter, tokens, part in _runs(rows, ranks, M):
        own, own_a, keep = wide[tokens], a[part], _keep(seed, tokens, x.shape[1], ps[adapter])
        if keep is not None:
            own, own_a = dropped(own, keep), own_a / (1 - ps[adapter])
        s = F.linear(own, as_dtype(own_a, wide.dtype))
        y[tokens].addmm_(s, as_dtype(b[:, part], wide.dtype).T, alpha=scales[adapter])
        all_s[tokens, : ranks[adapter]] = s
    return as_dtype(y, dtype), all_s


def _runs(rows: Tensor, ranks: Sequence[int], tokens: int) -> Iterator[tuple[int, slice, slice]]:
    """The adapter of each run of equal rows, the run's tokens, and the adapter's part of the ranks."""
    per_row, first = tokens // rows.shape[0], 0
    ends = list(accumulate(ranks))
    for adapter, run in groupby(rows.tolist()):
        last = first + per_row * len(list(run))
        if 0 <= adapter < len(ranks) and last > first:
            yield adapter, slice(first, last), slice(ends[adapter] - ranks[adapter], ends[adapter])
        first = last


def _keep(seed: Tensor | None, tokens: slice, K: int, p: float) -> Tensor | None:
    """The mask of a run of tokens, as `keep_bits` has it; None without dropout."""
    return None if p == 0 or seed is None else keep_bits(seed, tokens.stop - tokens.start, K, p, tokens.start)


def lora_linear_mixed_backward(
    d_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    rows: Tensor,
    ps: Sequence[float],
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
    for adapter, tokens, part in _runs(rows, ranks, M):
        scale, p, own_d_y = scales[adapter], ps[adapter], d_y[tokens]
        if needs_b and s is not None:
            d_b[:, part] += scale * (own_d_y.T @ as_dtype(s[tokens, : ranks[adapter]], wide))
        if not (needs_x or needs_a):
            continue
        d_s = own_d_y @ as_dtype(scale / (1 - p) * b[:, part], wide)
        keep = _keep(seed, tokens, w.shape[1], p)
        if needs_a and x is not None:
            own_x = as_dtype(x[tokens], wide)
            d_a[part] += d_s.T @ (own_x if keep is None else dropped(own_x, keep))
        if d_x is not None:
            added = d_s @ as_dtype(a[part], wide)
            d_x[tokens] += added if keep is None else drop_(added, keep)
    d_x = w.new_empty(0, dtype=narrow) if d_x is None else as_dtype(d_x, narrow)
    return d_x, as_dtype(d_a, a.dtype), as_dtype(d_b, b.dtype)
