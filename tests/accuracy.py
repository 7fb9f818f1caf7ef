"""Comparing an implementation with float64, measured against the error of eager PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def assert_as_accurate_as_eager(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """Bounds the maximal and the RMS error of `actual` by twice those of `eager`.

    Half a unit in the last place of the largest value is allowed besides: storing the exact result costs as much,
    and on a few elements eager may be exact by luck.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{what}: inf or nan"
    error, allowed = (actual.double() - exact).abs(), (eager.double() - exact).abs()
    unit = torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
    worst = error.argmax().item()
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    message = f"{what}: error {error.max():.3g} at {where}, eager's is {allowed.max():.3g}"
    assert error.max() <= 2 * allowed.max() + unit, message
    rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
    assert rms <= 2 * allowed_rms + unit, f"{what}: RMS error {rms:.3g}, eager's is {allowed_rms:.3g}"


def to_float64(value: Any) -> Any:
    """Float tensors of a value, or of a dict or list of values, in float64."""
    if isinstance(value, dict):
        return {key: to_float64(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_float64(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def compare(function: Callable, eager: Callable, *draws: dict[str, Any]) -> None:
    """Holds every output of `function` to `eager` run in the same dtype and in float64.

    Several draws of inputs are pooled: on a handful of elements the error of eager says nothing.
    """
    for index, results in enumerate(zip(*(_three_ways(function, eager, inputs) for inputs in draws), strict=True)):
        pools = zip(*results, strict=True)
        assert_as_accurate_as_eager(*(_pooled(list(pool)) for pool in pools), f"output {index}")


def _three_ways(function: Callable, eager: Callable, inputs: dict[str, Any]) -> list[tuple[Tensor, ...]]:
    """(actual, eager, exact) for each output."""
    results = function(**inputs), eager(**inputs), eager(**to_float64(inputs))
    return list(zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True))


def _pooled(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)
