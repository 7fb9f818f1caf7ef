"""y = x @ W.T + bias + scale * s @ B.T with s = dropout(x) @ A.T; the specification is `reference.lora_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import FEW_TOKENS
from .checks import check_operands
from .decode import decode_launch
from .int8_linear import int8_linear
from .launch import device_arch, device_name
from .linear import expand, linear_launch
from .owners import Owners
from .plan import Plan, choose_plan
from .scratch import dense_copy
from .shrink import shrink


def lora_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The contract is in `reference.lora_linear`; computed as `choose_plan` says.

    Raises:
        ValueError, TypeError: an operand's shape, size, device or dtype is none that the kernels take, or the rank
            is above 256.
    """
    check_operands(x, w, w_scale, a, b, bias=bias, seed=seed)
    (M, K), N, R = x.shape, w.shape[0], 0 if a is None else a.shape[0]
    arch, int8 = device_arch(x.device), w_scale is not None
    if threshold is not None and w_scale is not None and M > FEW_TOKENS:
        plan = choose_plan(arch, x.dtype, M, N, K, R, int8, p, "int8", device_name(x.device))
        return int8_linear(plan.tile, x, w, w_scale, bias, a, b, scale, p, seed, threshold)
    plan = choose_plan(arch, x.dtype, M, N, K, R, int8, p, "forward", device_name(x.device))
    return planned_forward(plan, x, w, w_scale, bias, a, b, scale, p, seed)


def planned_forward(
    plan: Plan, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    scale: float, p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`lora_linear` by a given plan of any kind; "decode" takes up to `plan.tile.block_m` tokens."""
    if plan.kind in ("decode", "fused"):
        return _one_launch(plan, x, w, w_scale, bias, a, b, scale, p, seed)
    s = x.new_empty(x.shape[0], 0) if a is None else shrink(x, a, p, seed)
    return planned_expand(plan, x, w, w_scale, bias, None if a is None else s, b, scale), s


def planned_expand(
    plan: Plan, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, s: Tensor | None, b: Tensor | None,
    scale: float, owners: Owners | None = None,
) -> Tensor:  # fmt: skip
    """y for a given s; a plan whose one launch would compute s, too, takes it as it is."""
    if plan.kind == "decode":
        y, arch = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device), device_arch(x.device)
        decode_launch(x, w, w_scale, bias, None, b, s, scale, 0.0, None, y, arch, plan.tile, owners).run(x.device)
        return y
    dense = dense_copy(w, w_scale, x.dtype) if plan.kind in ("scratch", "cublas") else None
    if dense is None:
        return expand(x, w, w_scale, bias, s, b, scale, tile=plan.tile, owners=owners)
    if plan.kind == "scratch":
        return expand(x, dense, None, bias, s, b, scale, tile=plan.tile, owners=owners)
    return _seeded(x, dense, bias, s, b, scale, owners)


def _one_launch(
    plan: Plan, x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    scale: float, p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    s = torch.empty(x.shape[0], 0 if a is None else a.shape[0], dtype=x.dtype, device=x.device)
    launch = decode_launch if plan.kind == "decode" else linear_launch
    written, arch = None if a is None else s, device_arch(x.device)
    launch(x, w, w_scale, bias, a, b, written, scale, p, seed, y, arch, plan.tile).run(x.device)
    return y, s


def _seeded(
    x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor | None, b: Tensor | None, scale: float, owners: Owners | None
) -> Tensor:
    """The low-rank part and the bias first, onto which PyTorch's own product is added."""
    if s is None and bias is None:
        return x @ w.T
    if s is None:
        return torch.addmm(bias.to(x.dtype), x, w.T)
    y = expand(x[:, :0], w[:, :0], None, bias, s, b, scale, owners=owners)
    return y.addmm_(x, w.T)
