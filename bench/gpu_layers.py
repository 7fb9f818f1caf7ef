"""The LoRA linears that race each other on a GPU, each from the same random weights, and what they do in a race."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from gpu import Calls, copies
from harness import assert_accurate
from peers import bitsandbytes_linear, imported
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora_kernels import reference

BF16 = torch.bfloat16
ALPHA = 32
TINY = 64  # by which sizes shrink where nothing is measured


@dataclass(frozen=True)
class Place:
    """Where a benchmark runs: on a GPU, or at tiny sizes wherever it is, once, for correctness."""

    device: str
    tiny: bool

    def size(self, full: int) -> int:
        return max(1, full // TINY) if self.tiny else full

    def shape(self, M: int, K: int, N: int, r: int = 16, p: float = 0.05) -> Shape:
        return Shape(self.size(M), self.size(K), self.size(N), r, p, self)


@dataclass(frozen=True)
class Shape:
    """One LoRA linear: M tokens, K in_features, N out_features, rank r and dropout p."""

    M: int
    K: int
    N: int
    r: int
    p: float
    place: Place

    @property
    def name(self) -> str:
        return f"{self.M} x {self.K} -> {self.N}, r={self.r}, p={self.p}"

    @property
    def sizes(self) -> dict[str, int]:
        return {"M": self.M, "K": self.K, "N": self.N, "r": self.r}

    def flop(self, products: int = 1) -> float:
        """Of the frozen products alone."""
        return 2.0 * self.M * self.N * self.K * products

    def bytes(self, weight: float = 2.0) -> float:
        """x, W and y once each in 16 bits, W with `weight` bytes per element."""
        return 2.0 * (self.M * self.K + self.M * self.N) + weight * self.N * self.K

    def random(self, *sizes: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.place.device).manual_seed(seed)
        return scale * torch.randn(*sizes, generator=generator, device=self.place.device)

    def x(self, seed: int) -> Tensor:
        return self.random(self.M, self.K, seed=seed).to(BF16)

    def d_y(self, seed: int) -> Tensor:
        return self.random(self.M, self.N, seed=100 + seed).to(BF16)

    def weight(self, seed: int) -> Tensor:
        return self.random(self.N, self.K, seed=200 + seed, scale=self.K**-0.5).to(BF16)

    def copies(self, weight: float = 2.0) -> int:
        return copies(int(self.bytes(weight)), self.place.device)


class Holder(nn.Module):
    """A model with one target."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.proj = nn.Linear(shape.K, shape.N, bias=False, device="meta", dtype=BF16)
        self.proj.weight = nn.Parameter(shape.weight(seed), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def fill_adapters(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for A and B, the same for every contender: B would start at zero.

    Contenders have other parameters beside them, and other names for these, so what counts is their order.
    """
    adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for index, parameter in enumerate(adapters):
            generator = torch.Generator(parameter.device).manual_seed(300 + seed + index)
            values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            parameter.copy_(0.02 * values)  # drawn in float32, so that another dtype rounds the same ones
    return model


Layer = Callable[[Shape, int], nn.Module]


def frozen(shape: Shape, seed: int) -> nn.Module:
    return Holder(shape, seed).proj


def ours(shape: Shape, seed: int, quantize: str | None = None, compute: str | None = None) -> nn.Module:
    model = Holder(shape, seed)
    settings = dict(alpha=ALPHA, dropout=shape.p, quantize=quantize, compute=compute)
    fastlora.patch(model, r=shape.r, targets=["proj"], **settings)  # type: ignore[arg-type]
    return fill_adapters(model, seed).train().proj


def ours_int8(shape: Shape, seed: int) -> nn.Module:
    return ours(shape, seed, "int8")


def ours_in_int8(shape: Shape, seed: int) -> nn.Module:
    """Activations in int8, too."""
    return ours(shape, seed, "int8", "int8")


def peft_layer(shape: Shape, seed: int, fp32: bool = False, int8: bool = False) -> nn.Module:
    peft, model = imported("peft"), Holder(shape, seed)
    if int8:
        model.proj = bitsandbytes_linear(model.proj, shape.place.device)
        model.is_loaded_in_8bit = True
    config = peft.LoraConfig(r=shape.r, lora_alpha=ALPHA, lora_dropout=shape.p, target_modules=["proj"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32)
    return fill_adapters(model, seed).train().base_model.model.proj


def peft_fp32(shape: Shape, seed: int) -> nn.Module:
    return peft_layer(shape, seed, fp32=True)


def peft_int8(shape: Shape, seed: int) -> nn.Module:
    return peft_layer(shape, seed, int8=True)


def peft_compiled(shape: Shape, seed: int) -> nn.Module:
    # At tiny sizes no compiler is needed to see that the layer can be traced.
    return torch.compile(peft_layer(shape, seed), backend="eager" if shape.place.tiny else "inductor")


def torchao_int8(shape: Shape, seed: int) -> nn.Module:
    """int8 weight-only, without an adapter."""
    quantization, model = imported("torchao.quantization"), Holder(shape, seed)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model.proj


def gemlite_int8(shape: Shape, seed: int) -> nn.Module:
    """A16W8, without an adapter."""
    return imported("gemlite.helper").A16W8(device=shape.place.device).from_linear(Holder(shape, seed).proj)


def forward(layer: Layer, shape: Shape, grad: bool = True, autocast: bool = False, weight: float = 2.0) -> Calls:
    """Calls of a layer on inputs of its own each, recording for a backward or not."""
    return [
        _forward(layer(shape, seed), shape.x(seed).requires_grad_(grad), grad, autocast, shape.place.device)
        for seed in range(shape.copies(weight))
    ]


def _forward(module: nn.Module, x: Tensor, grad: bool, autocast: bool, device: str) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.set_grad_enabled(grad), _autocast(autocast, device):
            return module(x)

    return call


def _autocast(enabled: bool, device: str) -> Any:
    return torch.autocast(device, BF16) if enabled else contextlib.nullcontext()


def training(layer: Layer, shape: Shape, autocast: bool = False, weight: float = 2.0) -> Calls:
    """Forwards and backwards down to the input and the adapters."""
    return [
        backward_too(layer(shape, seed), [shape.x(seed)], [shape.d_y(seed)], autocast)
        for seed in range(shape.copies(weight))
    ]


def backward_too(
    module: nn.Module, inputs: Iterable[Tensor], gradients: list[Tensor], autocast: bool = False
) -> Callable[[], Any]:
    """A call and its backward to all inputs and trainable parameters; nothing is accumulated between calls."""
    inputs = [x.requires_grad_() for x in inputs]
    device = inputs[0].device.type
    wanted = [*inputs, *(p for p in module.parameters() if p.requires_grad)]

    def call() -> Any:
        with _autocast(autocast, device):
            outputs = module(*inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return torch.autograd.grad(outputs, wanted, gradients)

    return call


def check_linear(shape: Shape, int8: bool = False, threshold: float | None = None) -> None:
    """Holds our forward and gradients to float64, with dropout, at the size that is timed."""
    inputs = _operands(shape, int8) | {"threshold": threshold}
    d_y = shape.d_y(0)
    found = _ours(inputs, d_y)
    eager, exact = _reference(inputs, d_y, BF16), _reference(inputs, d_y, torch.float64)
    for name in found:
        assert_accurate(f"{shape.name}, {name}", found[name].double() - exact[name], eager[name].double() - exact[name])


def _operands(shape: Shape, int8: bool) -> dict[str, Any]:
    weight = shape.weight(0)
    w, w_scale = ops.quantize_rows(weight) if int8 else (weight, None)
    return dict(
        x=shape.x(0), w=w, w_scale=w_scale, bias=None, a=shape.random(shape.r, shape.K, seed=1, scale=shape.K**-0.5),
        b=shape.random(shape.N, shape.r, seed=2, scale=0.1), scale=ALPHA / shape.r, p=shape.p,
        seed=torch.tensor([1234567], device=shape.place.device) if shape.p else None,
    )  # fmt: skip


def _ours(inputs: dict[str, Any], d_y: Tensor) -> dict[str, Tensor]:
    wanted = {name: inputs[name].clone().requires_grad_() for name in ("x", "a", "b")}
    y = ops.lora_linear(**(inputs | wanted))
    d_x, d_a, d_b = torch.autograd.grad(y, list(wanted.values()), d_y)
    return {"y": y.detach(), "d_x": d_x, "d_a": d_a, "d_b": d_b}


def _reference(inputs: dict[str, Any], d_y: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Eager PyTorch in a dtype, with the same mask."""
    cast = {
        name: value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and name != "w_scale"
        else value
        for name, value in inputs.items()
    }
    y, s = reference.lora_linear(**cast)
    del cast["bias"], cast["threshold"]
    gradients = reference.lora_linear_backward(d_y.to(dtype), s=s, needs_x=True, needs_a=True, needs_b=True, **cast)
    return {"y": y, **dict(zip(("d_x", "d_a", "d_b"), gradients, strict=True))}
