"""Running the model on calibration batches without leaving a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.registry import adapters, disabled
from .target import Target

Batch = dict[str, Any]


def batches(calibration: Any, model: nn.Module) -> Iterator[Batch]:
    """The batches with their tensors on the model's device.

    Raises:
        TypeError: a batch is no dictionary.
        ValueError: there is none.
    """
    device = next(model.parameters()).device
    empty = True
    for batch in calibration:
        if not isinstance(batch, Mapping):
            raise TypeError(f"calibration: expected batches of keyword arguments, found {type(batch).__name__}")
        empty = False
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    if empty:
        raise ValueError("calibration: expected at least one batch, found none")


def token_mask(batch: Batch, ignored_label: int | None) -> Tensor | None:
    """Which positions of a batch count, bool `[batch, tokens]`: no padding, and none with the ignored label."""
    mask = batch.get("attention_mask")
    mask = None if mask is None else mask.bool()
    labels = batch.get("labels")
    if ignored_label is None or labels is None or (mask is not None and mask.shape != labels.shape):
        return mask
    counted = labels != ignored_label
    return counted if mask is None else mask & counted


def counted_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The inputs `[tokens, K]` that count of a layer's input `[..., K]`; all where the mask is for other positions."""
    return x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])


@contextmanager
def inputs_seen(targets: Iterable[Target], see: Callable[[Target, Tensor], None]) -> Iterator[None]:
    """Calls `see` with every input of the targets inside a `with` block."""
    with ExitStack() as stack:
        for target in targets:

            def hook(module: nn.Module, args: tuple, target: Target = target) -> None:
                see(target, args[0].detach())

            stack.callback(target.module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def untouched(model: nn.Module, training: bool) -> Iterator[None]:
    """The model without adapters in training or evaluation mode inside a `with` block; then everything is as it was.

    That is every module's mode, the parameters' gradients and whether they train, the buffers, and torch's generators.
    """
    modes = {module: module.training for module in model.modules()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with torch.random.fork_rng(_gpus(model)), disabled(model) if adapters(model) else nullcontext():
            model.train(training)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, trains, gradient in parameters:
            parameter.requires_grad_(trains)
            parameter.grad = gradient
        for module, name, buffer, content in buffers:
            module._buffers[name] = buffer.copy_(content)


@contextmanager
def generators_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Gives torch's generators their state from before where the `with` block raises."""
    state, states = torch.get_rng_state(), [(gpu, torch.cuda.get_rng_state(gpu)) for gpu in _gpus(model)]
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            torch.set_rng_state(state)
            for gpu, gpu_state in states:
                torch.cuda.set_rng_state(gpu_state, gpu)


def _gpus(model: nn.Module) -> list[int]:
    return sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
