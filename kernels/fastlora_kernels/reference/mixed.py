"""A linear layer whose batch rows use different adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .linear import dropped, lora_linear, lora_linear_backward


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
    """`y_m = W x_m + bias + scale_e * B_e s_m`, `s_m = A_e (x_m * mask_m / (1 - p_e))`, e token m's adapter, or none.

    Args:
        x: `[M, K]`, any strides: the tokens of each row of the batch one after the other, M / B per row.
        w, w_scale, bias: as in `lora_linear`.
        a, b: `[sum of ranks, K]` and `[N, sum of ranks]`, adapter after adapter, any float dtype.
        ranks, scales, ps: one per adapter; `ps` are the probabilities of dropout.
        rows: int64 `[B]` on the device of x, the adapter of each row of the batch; any other number stands for none.
        seed: of the mask of all tokens, as in `lora_linear`; None where every p is 0.

    Returns:
        y `[M, N]` and s `[M, max rank]` in the dtype of x: each token's own ranks, then zeros.
    """
    y, _ = lora_linear(x, w, w_scale, bias, None, None, 1.0, 0.0, None)
    s = x.new_zeros(x.shape[0], max(ranks))
    for adapter, part, own in _owned(rows, ranks, x.shape[0]):
        own_s = dropped(x, ps[adapter], seed) @ a[part].to(x.dtype).T
        y = torch.where(own, y + scales[adapter] * (own_s @ b[:, part].to(x.dtype).T), y)
        s[:, : ranks[adapter]] = torch.where(own, own_s, s[:, : ranks[adapter]])
    return y, s


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
    """Gradients of `lora_linear_mixed` with respect to x, a and b; an adapter without rows has gradients of zero.

    Args:
        d_y: `[M, N]`, any strides.
        x: `[M, K]`, needed for d_a only.
        s: `[M, max rank]` as returned by the forward, needed for d_b only.
        needs_x, needs_a, needs_b: which gradients to compute.

    Returns:
        d_x in the dtype of d_y, d_a and d_b in those of a and b; an empty tensor for one that is not needed.
    """
    layer = None, w, w_scale, None, None, 1.0, 0.0, None
    d_x, _, _ = lora_linear_backward(d_y, None, *layer, needs_x, False, False)
    d_a, d_b = torch.zeros_like(a) if needs_a else a.new_empty(0), torch.zeros_like(b) if needs_b else b.new_empty(0)
    for adapter, part, own in _owned(rows, ranks, d_y.shape[0]):
        p, scale = ps[adapter], scales[adapter]
        d_s = torch.where(own, scale * (d_y @ b[:, part].to(d_y.dtype)), 0.0)
        if needs_x:
            d_x = torch.where(own, d_x + dropped(d_s @ a[part].to(d_y.dtype), p, seed), d_x)
        if needs_a and x is not None:
            d_a[part] = (d_s.T @ dropped(x, p, seed)).to(a.dtype)
        if needs_b and s is not None:
            own_s = torch.where(own, s[:, : ranks[adapter]], 0.0)
            d_b[:, part] = (scale * (d_y.T @ own_s)).to(b.dtype)
    return d_x, d_a, d_b


def _owned(rows: Tensor, ranks: Sequence[int], tokens: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Each adapter, its part of the ranks, and bool `[M, 1]`, true at its tokens."""
    owners, first = rows.repeat_interleave(tokens // rows.shape[0], output_size=tokens)[:, None], 0
    for adapter, rank in enumerate(ranks):
        yield adapter, slice(first, first + rank), owners == adapter
        first += rank
