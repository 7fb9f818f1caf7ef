"""What would run here against the float64 reference, beside eager PyTorch in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora_kernels import reference

from ..ops import implementation
from .facts import DTYPES, devices

M, K, N, R = 37, 96, 72, 8  # no whole tiles
SCALE, DROPOUT, SEED = 0.5, 0.25, 20240229

Inputs = dict[str, Any]
Function = Callable[[Any, Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Check:
    """One operator on one device in one dtype.

    Attributes:
        operator: forward, backward, merge, quantize or dropout.
        weights: "dense" or "int8".
        error, eager: the largest error of what runs here, and of eager PyTorch in the same dtype, against float64;
            for dropout how many elements differ.
        passed: whether the error is at most twice eager's, and what storing the exact result costs besides.
    """

    operator: str
    device: str
    dtype: str
    weights: str
    error: float
    eager: float
    passed: bool


def self_test() -> list[Check]:
    """Runs every operator that fastlora chooses here, in every dtype; a second or two, and no model is needed."""
    return [check for device in devices() for check in _checks_on(device)]


def _checks_on(device: torch.device) -> Iterator[Check]:
    for dtype in DTYPES:
        for int8 in (False, True):
            inputs = _inputs(device, dtype, int8)
            for operator, function in OPERATORS.items():
                if operator != "quantize" or not int8:
                    yield _check(operator, function, inputs, dtype, int8)
    yield _check_dropout(device)


def _inputs(device: torch.device, dtype: torch.dtype, int8: bool) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    w, w_scale = draw(N, K) / K**0.5, None
    if int8:
        w, w_scale = reference.quantize_rows(w)
    return dict(
        x=draw(M, K).to(dtype), d_y=draw(M, N).to(dtype), w=w if int8 else w.to(dtype), w_scale=w_scale,
        bias=draw(N).to(dtype), a=draw(R, K) / K**0.5, b=draw(N, R), seed=torch.tensor([SEED], device=device),
    )  # fmt: skip


def _forward(room: Any, i: Inputs) -> tuple[Tensor, ...]:
    y, s = room.lora_linear(i["x"], i["w"], i["w_scale"], i["bias"], i["a"], i["b"], SCALE, DROPOUT, i["seed"])
    return y, s


def _backward(room: Any, i: Inputs) -> tuple[Tensor, ...]:
    _, s = reference.lora_linear(i["x"], i["w"], i["w_scale"], None, i["a"], i["b"], SCALE, DROPOUT, i["seed"])
    adapter = i["a"], i["b"], SCALE, DROPOUT, i["seed"]
    return room.lora_linear_backward(i["d_y"], i["x"], s, i["w"], i["w_scale"], *adapter, True, True, True)


def _merge(room: Any, i: Inputs) -> tuple[Tensor, ...]:
    merged, scale = room.merge_rows(i["w"], i["w_scale"], i["a"], i["b"], SCALE)
    return (merged if i["w_scale"] is None else reference.dequantize_rows(merged, scale, torch.float32),)


def _quantize(room: Any, i: Inputs) -> tuple[Tensor, ...]:
    codes, scale = room.quantize_rows(i["x"])
    return codes.float(), scale


OPERATORS: dict[str, Function] = {
    "forward": _forward, "backward": _backward, "merge": _merge, "quantize": _quantize,
}  # fmt: skip


def _check(operator: str, function: Function, inputs: Inputs, dtype: torch.dtype, int8: bool) -> Check:
    wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}
    room = implementation(inputs["x"], R)
    results = function(room, inputs), function(reference, inputs), function(reference, wide)
    error, eager, passed = 0.0, 0.0, True
    for actual, plain, exact in zip(*results, strict=True):
        off, allowed = _distance(actual, exact), _distance(plain, exact)
        unit = torch.finfo(actual.dtype).eps / 2 * exact.abs().max().item()
        passed &= off <= 2 * allowed + unit  # false for nan
        error, eager = off if not off <= error else error, max(eager, allowed)  # keeps nan
    device, weights = inputs["x"].device, "int8" if int8 else "dense"
    return Check(operator, str(device), str(dtype).removeprefix("torch."), weights, error, eager, passed)


def _distance(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact.double()).abs().max().item()


def _check_dropout(device: torch.device) -> Check:
    seed = torch.tensor([SEED], device=device)
    found = implementation(seed).dropout_mask(seed, M, K, DROPOUT)
    wrong = (found.cpu() != reference.dropout_mask(seed.cpu(), M, K, DROPOUT)).sum().item()
    return Check("dropout", str(device), "bool", "dense", wrong, 0.0, wrong == 0)
