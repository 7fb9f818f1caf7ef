"""Gradients of `lora_linear` for x, a and b; the specification is `reference.lora_linear_backward`.

d_s = scale * d_y @ B,  d_b = scale * d_y.T @ s        output reduce, one read of d_y
d_a = d_s.T @ dropout(x)                               token reduce, one read of x
d_x = d_y @ W + mask / (1 - p) * (d_s @ A)             input gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_operands
from .input_gradient import input_gradient
from .launch import device_arch, device_name
from .output_reduce import output_reduce
from .owners import Owners
from .plan import Plan, choose_plan
from .scratch import dense_copy
from .token_reduce import token_reduce


def lora_linear_backward(
    d_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract is in `reference.lora_linear_backward`; the same inputs give the same bits.

    Raises:
        ValueError, TypeError: an operand's shape, size, device or dtype is none that the kernels take, or the rank
            is above 256.
    """
    check_operands(x, w, w_scale, a, b, d_y=d_y, s=s, seed=seed)
    (M, N), K, R = d_y.shape, w.shape[1], 0 if a is None else a.shape[0]
    arch, int8 = device_arch(d_y.device), w_scale is not None
    plan = choose_plan(arch, d_y.dtype, M, N, K, R, int8, p, "backward", device_name(d_y.device))
    return planned_backward(plan, d_y, x, s, w, w_scale, a, b, scale, p, seed, needs_x, needs_a, needs_b)


def planned_backward(
    plan: Plan, d_y: Tensor, x: Tensor | None, s: Tensor | None, w: Tensor, w_scale: Tensor | None, a: Tensor | None,
    b: Tensor | None, scale: float, p: float, seed: Tensor | None, needs_x: bool, needs_a: bool, needs_b: bool,
    out: Tensor | None = None, owners: Owners | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`lora_linear_backward` by a given plan: "two_pass", "scratch" or "cublas"; d_x is added to `out` if given.

    With `owners` it is that of `lora_linear_mixed`: their scales are taken for `scale`, their probabilities for p.
    """
    d_x, d_a, d_b, d_s = d_y.new_empty(0), d_y.new_empty(0), d_y.new_empty(0), None
    if a is not None and b is not None:
        needs_d_s = needs_x or needs_a
        if needs_d_s or needs_b:
            d_s, wanted = output_reduce(d_y, s, b, scale, needs_d_s, needs_b, owners)
            d_b = d_b if wanted is None else wanted
        if needs_a:
            new = torch.empty_like if owners is None else torch.zeros_like
            d_a = new(a, memory_format=torch.contiguous_format)
            token_reduce(d_s, x, 1.0, p, seed, out=d_a, owners=owners)
    if needs_x:
        d_x = _planned_input_gradient(plan, d_y, w, w_scale, d_s, a, p, seed, out, owners)
    return d_x, d_a, d_b


def _planned_input_gradient(
    plan: Plan, d_y: Tensor, w: Tensor, w_scale: Tensor | None, d_s: Tensor | None, a: Tensor | None,
    p: float, seed: Tensor | None, out: Tensor | None, owners: Owners | None,
) -> Tensor:  # fmt: skip
    dense, add = dense_copy(w, w_scale, d_y.dtype) if plan.kind in ("scratch", "cublas") else None, out is not None
    if dense is None:
        return input_gradient(d_y, w, w_scale, d_s, a, p, seed, out, add, plan.tile, owners)
    if plan.kind == "scratch":
        return input_gradient(d_y, dense, None, d_s, a, p, seed, out, add, plan.tile, owners)
    if a is None:
        return d_y @ dense if out is None else out.addmm_(d_y, dense)
    d_x = input_gradient(d_y[:, :0], dense[:0], None, d_s, a, p, seed, out, add, owners=owners)
    return d_x.addmm_(d_y, dense)
