"""Gated MLPs, `down(act(gate(x)) * up(x))`, that keep gate and up alone for their backward.

An MLP whose forward is written like that, as in Llama and most models after it, gets a class with the same forward, in
which the last product is one op with what it reads, where nothing else has to see that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from .. import ops
from .base import rebind_hooked_forward
from .branch import draw_seed
from .linear import LoraLinear

# Activations that are a function of each element alone.
ACTIVATIONS = {
    "SiLU", "SiLUActivation", "GELU", "GELUActivation", "GELUTanh", "PytorchGELUTanh", "NewGELUActivation",
    "FastGELUActivation", "QuickGELUActivation", "ReLU", "ReLUSquaredActivation", "Mish", "MishActivation", "Sigmoid",
    "Tanh",
}  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


class Written:
    """The forwards that are known to be nothing but a gated MLP."""

    def in_one_expression(self: Any, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def with_a_name(self: Any, x: Any) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


def _code(function: Any) -> tuple:
    """What a function does, whatever it calls its variables."""
    code = function.__code__
    return code.co_code, code.co_names, code.co_consts[1:], code.co_argcount, code.co_nlocals


_KNOWN = {_code(Written.in_one_expression), _code(Written.with_a_name)}


class GatedMLP(nn.Module):
    """A gated MLP with adapters on its last layer."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: Any
    act_fn: nn.Module

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _bare, (type(self).__bases__[1],), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        adapter = _adapter_alone(down, self.act_fn, gate, up)
        if adapter is None:
            return down(self.act_fn(gate) * up)
        w, w_scale, a, b, scale, p = down.operands(adapter)
        seed = draw_seed(gate) if p > 0 else None
        return ops.lora_linear_gated(
            self.act_fn, gate, up, w, w_scale, down.bias, a, b, scale, p, seed, down.threshold
        )  # fmt: skip


def _adapter_alone(down: Any, act: nn.Module, gate: Tensor, up: Tensor) -> str | None:
    """The adapter, where a backward is to come, one op computes the last layer, and nobody looks at what goes in."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if not isinstance(down, LoraLinear) or type(act).__name__ not in ACTIVATIONS:
        return None
    hooked = any(getattr(module, name) for module in (down, act) for name in _HOOKS)
    if hooked or any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return None
    adapter, bias = down.fused_adapter(), down.bias
    if adapter is None or (bias is not None and bias.requires_grad):
        return None
    w, w_scale, a, b, _, _ = down.operands(adapter)
    fits = gate.dtype == up.dtype and gate.shape == up.shape and (w_scale is not None or w.dtype == gate.dtype)
    # Tensors without data are a plan's, which counts what is kept.
    plain = isinstance(gate, FakeTensor) or ops.is_plain(gate, up, w, a, b)
    return adapter if fits and plain and gate.device == w.device else None


_classes: dict[type, type] = {}


def _class_for(original: type) -> type:
    if original not in _classes:
        _classes[original] = type(f"Gated{original.__name__}", (GatedMLP, original), {"__module__": __name__})
    return _classes[original]


def _bare(original: type) -> Any:
    """What a copy or a pickle fills: the class is made anew where it is not there."""
    kind: Any = _class_for(original)
    return kind.__new__(kind)


def form_gated(model: nn.Module) -> None:
    """Gives every gated MLP whose last layer has adapters the class that keeps less."""
    for module in model.modules():
        kind = type(module)
        if isinstance(module, GatedMLP) or not isinstance(module._modules.get("down_proj"), LoraLinear):
            continue
        if not hasattr(kind.forward, "__code__") or _code(kind.forward) not in _KNOWN:
            continue
        module.__class__ = _class_for(kind)
        rebind_hooked_forward(module)


def dissolve_gated(model: nn.Module) -> None:
    """Undoes `form_gated`."""
    for module in model.modules():
        if isinstance(module, GatedMLP):
            module.__class__ = type(module).__bases__[1]
            rebind_hooked_forward(module)
