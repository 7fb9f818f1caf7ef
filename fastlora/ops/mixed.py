"""`lora_linear_mixed`: one adapter per row of the batch, as a torch operator with a backward of its own.

Saved for the backward: x where an adapter trains, the rows and the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation
from .dtensor import check_local
from .linear import check_linear


@torch.library.custom_op("fastlora::lora_linear_mixed", mutates_args=())
def _forward(
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
    inputs = x, w, w_scale, bias, a, b, ranks, scales, rows, p, seed
    with torch.autocast(x.device.type, enabled=False):
        return implementation(x, max(ranks)).lora_linear_mixed(*inputs)


@_forward.register_fake
def _forward_fake(x, w, w_scale, bias, a, b, ranks, scales, rows, p, seed):
    return x.new_empty(x.shape[0], w.shape[0])


@torch.library.custom_op("fastlora::lora_linear_mixed_backward", mutates_args=())
def _backward(
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
    inputs = d_y, x, w, w_scale, a, b, ranks, scales, rows, p, seed, needs_x, needs_a, needs_b
    with torch.autocast(d_y.device.type, enabled=False):
        return implementation(d_y, max(ranks)).lora_linear_mixed_backward(*inputs)


@_backward.register_fake
def _backward_fake(d_y, x, w, w_scale, a, b, ranks, scales, rows, p, seed, needs_x, needs_a, needs_b):
    d_x = d_y.new_empty(d_y.shape[0], w.shape[1]) if needs_x else d_y.new_empty(0)
    d_a, d_b = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else t.new_empty(0)
        for t, needed in ((a, needs_a), (b, needs_b))
    )
    return d_x, d_a, d_b


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, w_scale, _, a, b, ctx.ranks, ctx.scales, rows, ctx.p, seed = inputs
    ctx.needs = x.requires_grad, a.requires_grad, b.requires_grad
    ctx.save_for_backward(x if a.requires_grad or b.requires_grad else None, w, w_scale, a, b, rows, seed)


def _differentiate(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    x, w, w_scale, a, b, rows, seed = ctx.saved_tensors
    gradients = _backward(d_y, x, w, w_scale, a, b, ctx.ranks, ctx.scales, rows, ctx.p, seed, *ctx.needs)
    d_x, d_a, d_b = (d if needed else None for d, needed in zip(gradients, ctx.needs, strict=True))
    return d_x, None, None, None, d_a, d_b, None, None, None, None, None


torch.library.register_autograd("fastlora::lora_linear_mixed", _differentiate, setup_context=_save)


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
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """A LoRA linear with one adapter per row of the batch, or none; differentiable in x, a and b.

    The contract is in `fastlora_kernels.reference.lora_linear_mixed`; here x may have any number of leading axes, which
    hold the rows of the batch one after another.

    Raises:
        ValueError, TypeError: as `lora_linear`; or the rows do not divide the tokens, or the ranks do not add up.
    """
    check_linear(x, w, w_scale, a, b, p, seed)
    check_local(x, w, a)
    B, M = rows.shape[0], x.numel() // x.shape[-1]
    if M % B:
        raise ValueError(f"mixed: expected a batch of {B} rows, as adapters were given for, found {M} tokens")
    if sum(ranks) != a.shape[0] or len(ranks) != len(scales):
        raise ValueError(f"ranks: expected a sum of {a.shape[0]} and {len(scales)} of them, found {list(ranks)}")
    y = _forward(x.reshape(M, x.shape[-1]), w, w_scale, bias, a, b, ranks, scales, rows.to(x.device), p, seed)
    return y.view(*x.shape[:-1], w.shape[0])
