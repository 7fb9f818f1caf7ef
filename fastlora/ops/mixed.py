"""`lora_linear_mixed`: one adapter per row of the batch, as a torch operator with a backward of its own.

Saved for the backward: what one adapter saves, that is x where an adapter's A trains, s where its B does, and the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import run
from .dtensor import check_local
from .linear import check_linear, is_plain


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
    ps: Sequence[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return run("lora_linear_mixed", x, max(ranks), x, w, w_scale, bias, a, b, ranks, scales, rows, ps, seed)


@_forward.register_fake
def _forward_fake(x, w, w_scale, bias, a, b, ranks, scales, rows, ps, seed):
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], max(ranks))


@torch.library.custom_op("fastlora::lora_linear_mixed_backward", mutates_args=())
def _backward(
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
    inputs = d_y, x, s, w, w_scale, a, b, ranks, scales, rows, ps, seed, needs_x, needs_a, needs_b
    return _run_backward(*inputs)


def _run_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return run("lora_linear_mixed_backward", inputs[0], max(inputs[7]), *inputs)


@_backward.register_fake
def _backward_fake(d_y, x, s, w, w_scale, a, b, ranks, scales, rows, ps, seed, needs_x, needs_a, needs_b):
    d_x = d_y.new_empty(d_y.shape[0], w.shape[1]) if needs_x else d_y.new_empty(0)
    d_a, d_b = (
        torch.empty_like(t, memory_format=torch.contiguous_format) if needed else t.new_empty(0)
        for t, needed in ((a, needs_a), (b, needs_b))
    )
    return d_x, d_a, d_b


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w, w_scale, _, a, b, ctx.ranks, ctx.scales, rows, ctx.ps, seed = inputs
    ctx.needs = x.requires_grad, a.requires_grad, b.requires_grad
    _, needs_a, needs_b = ctx.needs
    ctx.save_for_backward(x if needs_a else None, output[1] if needs_b else None, w, w_scale, a, b, rows, seed)


def _differentiate(ctx: Any, d_y: Tensor, _d_s: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(_backward, ctx, d_y)


def _gradients(backward: Callable, ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    """One gradient per argument of `_forward`."""
    x, s, w, w_scale, a, b, rows, seed = ctx.saved_tensors  # read once: under checkpointing, reading recomputes
    gradients = backward(d_y, x, s, w, w_scale, a, b, ctx.ranks, ctx.scales, rows, ctx.ps, seed, *ctx.needs)
    d_x, d_a, d_b = (d if needed else None for d, needed in zip(gradients, ctx.needs, strict=True))
    return d_x, None, None, None, d_a, d_b, None, None, None, None, None


torch.library.register_autograd("fastlora::lora_linear_mixed", _differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same operator without the dispatcher, as in `linear`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = run("lora_linear_mixed", inputs[0], max(inputs[6]), *inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(_run_backward, ctx, d_y)


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
    seed: Tensor | None = None,
) -> Tensor:
    """A LoRA linear with one adapter per row of the batch, or none; differentiable in x, a and b.

    The contract is in `fastlora_kernels.reference.lora_linear_mixed`; here x may have any number of leading axes, which
    hold the rows of the batch one after another.

    Raises:
        ValueError, TypeError: as `lora_linear`; or the rows do not divide the tokens, the ranks do not add up, or
            there are not as many scales and ps as ranks.
    """
    check_linear(x, w, w_scale, a, b, max(ps, default=0.0), seed)
    B, M = rows.shape[0], x.numel() // x.shape[-1]
    if not B or M % B:
        raise ValueError(f"mixed: expected a batch of {B} rows, as adapters were given for, found {M} tokens")
    if sum(ranks) != a.shape[0] or not len(ranks) == len(scales) == len(ps):
        found = f"{list(ranks)}, {len(scales)} scales and {len(ps)} ps"
        raise ValueError(f"ranks: expected a sum of {a.shape[0]}, and a scale and a p for each, found {found}")
    flat = x if x.dim() == 2 else x.reshape(M, x.shape[-1])
    inputs = flat, w, w_scale, bias, a, b, ranks, scales, rows.to(x.device), ps, seed
    if not is_plain(x, w, a, rows):
        check_local(x, w, a)
        y, _ = _forward(*inputs)
    elif torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        y = _Eager.apply(*inputs)
    else:
        y, _ = run("lora_linear_mixed", flat, max(ranks), *inputs)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w.shape[0])
