"""`lora_linear` as a torch operator with a backward of its own.

Saved for the backward: x where a needs a gradient, s where b needs one, and the seed. Neither the mask nor the
dropped x nor a dense weight is kept, and the frozen weight never gets a gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .dispatch import run
from .dtensor import check_local


def _run(name: str, a: Tensor | None, *inputs: Any) -> Any:
    """Calls a function of the room that computes for the first input at the rank of `a`."""
    return run(name, inputs[0], 0 if a is None else a.shape[0], *inputs)


@torch.library.custom_op("fastlora::lora_linear", mutates_args=())
def forward(
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
    return _run("lora_linear", a, x, w, w_scale, bias, a, b, scale, p, seed, threshold)


@forward.register_fake
def _forward_fake(x, w, w_scale, bias, a, b, scale, p, seed, threshold=None):
    return x.new_empty(x.shape[0], w.shape[0]), x.new_empty(x.shape[0], 0 if a is None else a.shape[0])


@torch.library.custom_op("fastlora::lora_linear_backward", mutates_args=())
def backward(
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
    inputs = d_y, x, s, w, w_scale, a, b, scale, p, seed, needs_x, needs_a, needs_b
    return _run("lora_linear_backward", a, *inputs)


@backward.register_fake
def _backward_fake(d_y, x, s, w, w_scale, a, b, scale, p, seed, needs_x, needs_a, needs_b):
    d_x = d_y.new_empty(d_y.shape[0], w.shape[1]) if needs_x else d_y.new_empty(0)
    d_a = torch.empty_like(a, memory_format=torch.contiguous_format) if needs_a else d_y.new_empty(0)
    d_b = torch.empty_like(b, memory_format=torch.contiguous_format) if needs_b else d_y.new_empty(0)
    return d_x, d_a, d_b


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w, w_scale, _, a, b, ctx.scale, ctx.p, seed, _ = inputs
    needs_x, _, _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
    ctx.needs = needs_x, needs_a, needs_b
    ctx.save_for_backward(x if needs_a else None, output[1] if needs_b else None, w, w_scale, a, b, seed)


def _differentiate(ctx: Any, d_y: Tensor, _d_s: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(backward, ctx, ctx.saved_tensors, d_y)


def _gradients(backward: Callable, ctx: Any, saved: tuple, d_y: Tensor) -> tuple[Tensor | None, ...]:
    """One gradient per argument of `forward`."""
    x, s, w, w_scale, a, b, seed = saved
    needs_x, needs_a, needs_b = ctx.needs
    d_x, d_a, d_b = backward(d_y, x, s, w, w_scale, a, b, ctx.scale, ctx.p, seed, needs_x, needs_a, needs_b)
    return (
        d_x if needs_x else None, None, None, None, d_a if needs_a else None, d_b if needs_b else None,
        None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("fastlora::lora_linear", _differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same operator without the dispatcher, whose passage costs more than a small layer computes."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _run("lora_linear", inputs[4], *inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under checkpointing, reading recomputes
        return _gradients(functools.partial(_run, "lora_linear_backward", saved[4]), ctx, saved, d_y)


_PLAIN_TYPES = {Tensor, Parameter}


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd looks on: no compiler or tracer, no subclass of Tensor, no fake or meta tensor."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
    ):
        return False
    for tensor in tensors:  # noqa: SIM110, a generator costs as much as a small product
        if tensor is not None and (type(tensor) not in _PLAIN_TYPES or tensor.is_meta):
            return False
    return True


def lora_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    """`y = x W^T + bias + scale * ((x * mask / (1 - p)) A^T) B^T`, differentiable in x, a and b.

    The contract is in `fastlora_kernels.reference.lora_linear`; here x may have any number of leading axes.
    A trainable bias is for the caller to add.

    Raises:
        ValueError: shapes do not fit, a and b are not given together, p is outside [0, 1), there is no seed
            for p > 0, or threshold is not above 0.
        TypeError: an int8 w without w_scale, or w_scale with a dense w, or a DTensor.
    """
    check_linear(x, w, w_scale, a, b, p, seed)
    check_threshold(threshold)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    inputs = (flat, w, w_scale, bias, a, b, scale, p, seed, threshold)
    if not is_plain(x, w, a):
        check_local(x, w, a)
        y, _ = forward(*inputs)
    elif torch.is_grad_enabled() and (
        x.requires_grad or (a is not None and a.requires_grad) or (b is not None and b.requires_grad)
    ):
        y = _Eager.apply(*inputs)
    else:
        y, _ = _run("lora_linear", a, *inputs)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w.shape[0])


def check_linear(
    x: Tensor, w: Tensor, w_scale: Tensor | None, a: Tensor | None, b: Tensor | None, p: float, seed: Tensor | None
) -> None:
    N, K = w.shape
    if x.shape[-1] != K:
        raise ValueError(f"x: expected {K} features in its last axis, as w has, found shape {tuple(x.shape)}")
    if (w.dtype == torch.int8) != (w_scale is not None):
        raise TypeError(f"w_scale: expected for an int8 w and only then, found {w_scale is not None} with {w.dtype}")
    if (a is None) != (b is None):
        raise ValueError("a, b: expected both or neither")
    if a is not None and b is not None and (a.shape[1] != K or b.shape != (N, a.shape[0])):
        raise ValueError(f"a, b: expected [R, {K}] and [{N}, R], found {list(a.shape)} and {list(b.shape)}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected 0 <= p < 1, found {p}")
    if p > 0 and a is not None and seed is None:
        raise ValueError("seed: expected one int64 where p > 0, found None")


def check_threshold(threshold: float | None) -> None:
    if threshold is not None and not threshold > 0:
        raise ValueError(f"threshold: expected None or a number above 0, found {threshold}")
