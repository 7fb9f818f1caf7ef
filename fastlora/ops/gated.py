"""`lora_linear` of a gated activation, whose product is computed again in the backward instead of kept.

    y = lora_linear(act(gate) * up)

A gated MLP (Shazeer 2020) keeps `gate`, `act(gate)`, `up` and their product for its backward; two of these four wide
tensors are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import linear
from .dispatch import run


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, act: Callable[[Tensor], Tensor], plain: bool, gate: Tensor, up: Tensor, *operands: Any
    ) -> Tensor:
        w, w_scale, _, a, b, ctx.scale, ctx.p, seed, _ = operands
        x = act(gate) * up
        inputs = x.reshape(-1, x.shape[-1]), *operands
        y, s = run("lora_linear", x, a.shape[0], *inputs) if plain else linear.forward(*inputs)
        needs_x = any(ctx.needs_input_grad[2:4])
        ctx.act, ctx.plain, ctx.needs = act, plain, (needs_x, a.requires_grad, b.requires_grad)
        ctx.save_for_backward(gate, up, s if b.requires_grad else None, w, w_scale, a, b, seed)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, s, w, w_scale, a, b, seed = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs
        with torch.enable_grad():
            leaves = gate.detach().requires_grad_(), up.detach().requires_grad_()
            x = ctx.act(leaves[0]) * leaves[1]
        flat, d_flat = x.detach().reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
        inputs = d_flat, flat if needs_a else None, s, w, w_scale, a, b, ctx.scale, ctx.p, seed, *ctx.needs
        d_x, d_a, d_b = (
            run("lora_linear_backward", flat, a.shape[0], *inputs) if ctx.plain else linear.backward(*inputs)
        )
        d_gate, d_up = torch.autograd.grad(x, leaves, d_x.view(x.shape)) if needs_x else (None, None)
        d_a, d_b = d_a if needs_a else None, d_b if needs_b else None
        return None, None, d_gate, d_up, None, None, None, d_a, d_b, None, None, None, None


def lora_linear_gated(
    act: Callable[[Tensor], Tensor],
    gate: Tensor,
    up: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    seed: Tensor | None,
    threshold: float | None = None,
) -> Tensor:
    """`lora_linear(act(gate) * up, w, ...)`, differentiable in gate, up, a and b, with the same bits as that.

    It is for eager code: a compiler decides by itself what to keep.

    Args:
        act: a function of each element alone, with no state and no randomness.
        gate, up: `[..., K]`.
        w, w_scale, bias, a, b, scale, p, seed, threshold: as in `lora_linear`.

    Returns:
        `[..., N]` in the dtype of `act(gate) * up`.

    Raises:
        ValueError, TypeError: as `lora_linear`.
    """
    linear.check_linear(gate, w, w_scale, a, b, p, seed)
    linear.check_threshold(threshold)
    plain = linear.is_plain(gate, up, w, a)
    return _Gated.apply(act, plain, gate, up, w, w_scale, bias, a, b, scale, p, seed, threshold)
