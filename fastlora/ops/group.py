"""`lora_linear_group`: several LoRA linears that read one x, as a torch operator with a backward of its own.

Saved for the backward: x once, and s and the seed of every layer, as much as the layers would save by themselves. The
gradient of x is summed in place, where autograd would keep one per layer and add them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import run
from .dtensor import check_local
from .linear import check_linear, check_threshold, is_plain

LISTS = 6  # of tensors among the arguments: ws, w_scales, biases, a_s, b_s, seeds


def _run(name: str, x: Tensor, a_s: Sequence[Tensor], *inputs: Any) -> Any:
    """Calls a function of the room that computes for x at the highest rank of `a_s`."""
    return run(name, x, max(a.shape[0] for a in a_s), *inputs)


@torch.library.custom_op("fastlora::lora_linear_group", mutates_args=())
def _forward(
    x: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[Tensor | None],
    threshold: float | None,
) -> tuple[list[Tensor], list[Tensor]]:
    return _run("lora_linear_group", x, a_s, x, ws, w_scales, biases, a_s, b_s, scales, ps, seeds, threshold)


@_forward.register_fake
def _forward_fake(x, ws, w_scales, biases, a_s, b_s, scales, ps, seeds, threshold):
    return [x.new_empty(x.shape[0], w.shape[0]) for w in ws], [x.new_empty(x.shape[0], a.shape[0]) for a in a_s]


@torch.library.custom_op("fastlora::lora_linear_group_backward", mutates_args=())
def _backward(
    d_ys: Sequence[Tensor | None],
    x: Tensor | None,
    ss: Sequence[Tensor | None],
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[Tensor | None],
    needs_x: bool,
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    inputs = d_ys, x, ss, ws, w_scales, a_s, b_s, scales, ps, seeds, needs_x, needs_a, needs_b
    return _run("lora_linear_group_backward", _first(d_ys), a_s, *inputs)


@_backward.register_fake
def _backward_fake(d_ys, x, ss, ws, w_scales, a_s, b_s, scales, ps, seeds, needs_x, needs_a, needs_b):
    d_y = _first(d_ys)
    d_x = d_y.new_empty(d_y.shape[0], ws[0].shape[1]) if needs_x else d_y.new_empty(0)
    return d_x, _like(a_s, d_ys, needs_a), _like(b_s, d_ys, needs_b)


def _like(tensors: Sequence[Tensor], d_ys: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if needs and d_y is not None
        else tensor.new_empty(0)
        for tensor, d_y, needs in zip(tensors, d_ys, needed, strict=True)
    ]


def _first(d_ys: Sequence[Tensor | None]) -> Tensor:
    return next(d_y for d_y in d_ys if d_y is not None)


def _save(ctx: Any, x: Tensor, lists: Sequence[Any], scales: Any, ps: Any, ss: Sequence[Tensor]) -> None:
    """Keeps what the backward needs. A list among the inputs has no `ctx.needs_input_grad` of its own."""
    ws, w_scales, _, a_s, b_s, seeds = lists
    needs_a, needs_b = [a.requires_grad for a in a_s], [b.requires_grad for b in b_s]
    ctx.needs, ctx.scales, ctx.ps = (x.requires_grad, needs_a, needs_b), scales, ps
    kept = [s if needed else None for s, needed in zip(ss, needs_b, strict=True)]
    ctx.save_for_backward(x if any(needs_a) else None, *kept, *ws, *w_scales, *a_s, *b_s, *seeds)


def _gradients(backward: Callable, ctx: Any, d_ys: Sequence[Tensor | None]) -> tuple[Any, list, list]:
    """The gradients of x, a_s and b_s, None for those that get none."""
    x, *rest = ctx.saved_tensors  # read once: under checkpointing, reading recomputes
    count, (needs_x, needs_a, needs_b) = len(d_ys), ctx.needs
    ss, ws, w_scales, a_s, b_s, seeds = (rest[i : i + count] for i in range(0, LISTS * count, count))
    d_x, d_as, d_bs = backward(
        d_ys, x, ss, ws, w_scales, a_s, b_s, ctx.scales, ctx.ps, seeds, needs_x, needs_a, needs_b
    )  # fmt: skip
    d_as = [d if wanted and d_y is not None else None for d, wanted, d_y in zip(d_as, needs_a, d_ys, strict=True)]
    d_bs = [d if wanted and d_y is not None else None for d, wanted, d_y in zip(d_bs, needs_b, d_ys, strict=True)]
    return d_x if needs_x else None, d_as, d_bs


def _setup(ctx: Any, inputs: tuple, output: tuple[list[Tensor], list[Tensor]]) -> None:
    x, ws, w_scales, biases, a_s, b_s, scales, ps, seeds, _ = inputs
    _save(ctx, x, (ws, w_scales, biases, a_s, b_s, seeds), scales, ps, output[1])
    ctx.no_gradients = [_no_gradients(tensors) for tensors in (ws, w_scales, biases, seeds)]


def _no_gradients(tensors: Sequence[Tensor | None]) -> list[None] | None:
    """What stands for the gradients of a list: torch takes one with a None in it for a single value."""
    return None if any(tensor is None for tensor in tensors) else [None] * len(tensors)


def _differentiate(ctx: Any, d_ys: Sequence[Tensor | None], _d_ss: Any) -> tuple[Any, ...]:
    d_x, d_as, d_bs = _gradients(_backward, ctx, d_ys)
    ws, w_scales, biases, seeds = ctx.no_gradients
    return d_x, ws, w_scales, biases, d_as, d_bs, None, None, seeds, None


torch.library.register_autograd("fastlora::lora_linear_group", _differentiate, setup_context=_setup)


class _Eager(torch.autograd.Function):
    """The same operator without the dispatcher, as in `linear`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Sequence[float], ps: Sequence[float], threshold: float | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        count = len(scales)
        lists = tuple(tensors[i : i + count] for i in range(0, LISTS * count, count))
        ws, w_scales, biases, a_s, b_s, seeds = lists
        ys, ss = _run("lora_linear_group", x, a_s, x, ws, w_scales, biases, a_s, b_s, scales, ps, seeds, threshold)
        ctx.set_materialize_grads(False)
        _save(ctx, x, lists, scales, ps, ss)
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_ys: Tensor | None) -> tuple[Tensor | None, ...]:
        def run(*inputs: Any) -> Any:
            return _run("lora_linear_group_backward", _first(inputs[0]), inputs[5], *inputs)

        count = len(d_ys)
        if all(d_y is None for d_y in d_ys):
            return (None,) * (4 + LISTS * count)
        d_x, d_as, d_bs = _gradients(run, ctx, d_ys)
        return d_x, None, None, None, *[None] * (3 * count), *d_as, *d_bs, *[None] * count


def lora_linear_group(
    x: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[Tensor | None],
    threshold: float | None = None,
) -> list[Tensor]:
    """`lora_linear` of every layer on one x, differentiable in x, a_s and b_s.

    The contract is in `fastlora_kernels.reference.lora_linear_group`; here x may have any number of leading axes. One
    backward computes the gradients of all layers, so it runs once per forward, unless with `retain_graph`.

    Raises:
        ValueError, TypeError: as `lora_linear`; or the sequences are not of one length.
    """
    for layer in zip(ws, w_scales, a_s, b_s, ps, seeds, strict=True):
        check_linear(x, *layer)
    check_threshold(threshold)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if not is_plain(x, *ws, *a_s):
        check_local(x, *ws, *a_s)
        ys, _ = _forward(flat, ws, w_scales, biases, a_s, b_s, scales, ps, seeds, threshold)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (x, *a_s, *b_s)):
        ys = _Eager.apply(flat, scales, ps, threshold, *ws, *w_scales, *biases, *a_s, *b_s, *seeds)
    else:
        inputs = flat, ws, w_scales, biases, a_s, b_s, scales, ps, seeds, threshold
        ys, _ = _run("lora_linear_group", flat, a_s, *inputs)
    if x.dim() == 2:
        return list(ys)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]
