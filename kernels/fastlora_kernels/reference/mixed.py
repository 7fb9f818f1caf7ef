"""A linear layer whose batch rows use different adapters."""

from __future__ import annotations

from collections.abc import Sequence

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
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """`y_m = W x_m + bias + scale_e * B_e A_e (x_m * mask_m / (1 - p))`, e the adapter of token m, or none.

    Args:
        x: `[M, K]`, any strides: the tokens of each row of the batch one after the other, M / B per row.
        w, w_scale, bias: as in `lora_linear`.
        a, b: `[sum of ranks, K]` and `[N, sum of ranks]`, adapter after adapter, any float dtype.
        ranks, scales: one per adapter.
        rows: int64 `[B]` on the device of x, the adapter of each row of the batch; any other number stands for none.
        p, seed: dropout of every adapter's input, as in `lora_linear`.

    Returns:
        y `[M, N]` in the dtype of x.
    """
    y, _ = lora_linear(x, w, w_scale, bias, None, None, 1.0, 0.0, None)
    factors = _factors(rows, ranks, scales, x.shape[0], x.dtype)
    s = (dropped(x, p, seed) @ a.to(x.dtype).T) * factors
    return y + s @ b.to(x.dtype).T


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
    """Gradients of `lora_linear_mixed` with respect to x, a and b.

    Args:
        d_y: `[M, N]`, any strides.
        x: `[M, K]`, needed for d_a and for d_b, which computes `A x` again: it may be as large as x.
        needs_x, needs_a, needs_b: which gradients to compute.

    Returns:
        d_x in the dtype of d_y, d_a and d_b in those of a and b; an empty tensor for one that is not needed.
    """
    layer = None, w, w_scale, None, None, 1.0, 0.0, None
    d_x, d_a, d_b = lora_linear_backward(d_y, None, *layer, needs_x, False, False)
    d_a, d_b = a.new_empty(0), b.new_empty(0)
    factors = _factors(rows, ranks, scales, d_y.shape[0], d_y.dtype)
    d_s = (d_y @ b.to(d_y.dtype)) * factors
    if needs_x:
        d_x = d_x + dropped(d_s @ a.to(d_y.dtype), p, seed)
    if needs_a and x is not None:
        d_a = (d_s.T @ dropped(x, p, seed)).to(a.dtype)
    if needs_b and x is not None:
        s = (dropped(x, p, seed) @ a.to(x.dtype).T) * factors
        d_b = (d_y.T @ s).to(b.dtype)
    return d_x, d_a, d_b


def own_columns(rows: Tensor, ranks: Sequence[int], tokens: int) -> Tensor:
    """bool `[M, sum of ranks]`: true in the columns of each token's adapter."""
    owners = torch.cat([torch.full((rank,), adapter, device=rows.device) for adapter, rank in enumerate(ranks)])
    return rows.repeat_interleave(tokens // rows.shape[0], output_size=tokens)[:, None] == owners


def _factors(rows: Tensor, ranks: Sequence[int], scales: Sequence[float], tokens: int, dtype: torch.dtype) -> Tensor:
    """`[M, sum of ranks]`: the scale of each token's adapter in its columns, zero elsewhere."""
    scale = torch.cat(
        [torch.full((r,), s, dtype=dtype, device=rows.device) for r, s in zip(ranks, scales, strict=True)]
    )
    return own_columns(rows, ranks, tokens) * scale
