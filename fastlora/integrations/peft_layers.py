"""PEFT's LoRA layers with a forward on fastlora's ops, and the rules for when it may stand in for PEFT's."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..layers import EQUIVALENT_LINEARS
from ..log import logger

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class OnOps:
    """A LoRA layer of PEFT that computes `W x + bias + scaling * B A dropout(x)` by one op where that is all it does.

    Everything is read from PEFT's attributes in every call, so whatever PEFT changes takes effect.

    Attributes:
        peft_class: PEFT's class of the layer.
        computes_base: whether the op also computes a call that no adapter takes part in.
    """

    peft_class: ClassVar[type[nn.Module]]
    computes_base: ClassVar[bool] = False

    @staticmethod
    def base_obstacle(base: Any) -> str | None:
        """Why the op cannot compute the frozen layer, or None."""
        raise NotImplementedError

    @staticmethod
    def frozen_weight(base: Any) -> Tensor:
        """The frozen weight `[N, K]`."""
        raise NotImplementedError

    @staticmethod
    def weight_scale(base: Any) -> Tensor | None:
        """The scale `[N]` of an int8 weight, else None."""
        return None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        reason = "arguments beside the input" if args or kwargs else obstacle(type(self), layer, x)
        if reason is None:
            return _compute(type(self), layer, x)
        if not torch.compiler.is_compiling():
            _log_fallback(reason)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]


class FastLoraLinear(OnOps, lora.Linear):
    """PEFT's LoRA layer over `nn.Linear` or transformers' `Conv1D`."""

    peft_class = lora.Linear

    @staticmethod
    def base_obstacle(base: Any) -> str | None:
        if isinstance(base, Conv1D):
            known = type(base).forward is Conv1D.forward
        else:
            known = isinstance(base, nn.Linear) and (
                type(base).forward is nn.Linear.forward or type(base).__name__ in EQUIVALENT_LINEARS
            )
        weight = base._parameters.get("weight")
        if not known or weight is None:  # a parametrised module is of another class and computes its weight
            return f"a base layer of class {type(base).__name__}"
        if weight.requires_grad:
            return "the base layer's weight trains"
        return _tensor_obstacle("the base layer's weight", weight)

    @staticmethod
    def frozen_weight(base: Any) -> Tensor:
        weight = base._parameters["weight"]
        return weight.T if isinstance(base, Conv1D) else weight


def obstacle(fast: type[OnOps], layer: Any, x: Tensor | None = None) -> str | None:
    """Why a layer's call is left to PEFT's forward, or None where the op does the same; x counts where it is given."""
    names = _adapters(layer)
    if (reason := _state_obstacle(fast, layer, names)) is not None:
        return reason
    base = layer._modules["base_layer"]
    if (reason := fast.base_obstacle(base)) is not None:
        return reason
    if _is_hooked(base):
        return "hooks on the base layer"
    if _has_any_global_hook():
        return "hooks on all modules"
    if names and (reason := _branch_obstacle(layer, names[0])) is not None:
        return reason
    return None if x is None else _input_obstacle(fast, layer, names, x)


def _adapters(layer: Any) -> list[str]:
    """The adapters that take part in a call."""
    if layer.disable_adapters or layer.merged:
        return []
    present = layer._modules["lora_A"]._modules
    return [name for name in layer.active_adapters if name in present]


def _state_obstacle(fast: type[OnOps], layer: Any, names: list[str]) -> str | None:
    if len(names) > 1:
        return "several adapters are active"
    if layer.disable_adapters and layer.merged:
        return "the adapters are disabled and merged, and PEFT unmerges them first"
    if names or fast.computes_base:
        return None
    if layer.disable_adapters:
        return "the adapters are disabled"
    return "an adapter is merged" if layer.merged else "no adapter of the layer is active"


def _branch_obstacle(layer: Any, name: str) -> str | None:
    modules = layer._modules
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__}"
    if type(a) is not nn.Linear or type(b) is not nn.Linear:
        return f"lora_A and lora_B of class {type(a).__name__} and {type(b).__name__}"
    if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
        return "lora_bias"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.p >= 1.0):
        return f"a dropout layer {dropout}"
    if _is_hooked(a) or _is_hooked(b) or _is_hooked(dropout):
        return "hooks on lora_A, lora_B or lora_dropout"
    if not layer.cast_input_dtype_enabled:
        return "the casting of inputs is switched off"
    a, b = a._parameters["weight"], b._parameters["weight"]
    return _tensor_obstacle("lora_A", a) or _tensor_obstacle("lora_B", b)


def _tensor_obstacle(what: str, tensor: Any) -> str | None:
    """Why an op cannot take a tensor; a DTensor, say, whose parts are elsewhere."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return f"{what} is of class {type(tensor).__name__}"
    return None if tensor.dtype in FLOATS else f"{what} is in {tensor.dtype}"


def _is_hooked(module: Any) -> bool:
    """Whether a call of the module does more than its class's forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if "forward" not in module.__dict__:
        return False
    # On models spread over devices accelerate's hook moves the input to the weight, where the op expects it already.
    hook = module.__dict__.get("_hf_hook")
    return type(hook) is not AlignDevicesHook or hook.offload


def _input_obstacle(fast: type[OnOps], layer: Any, names: list[str], x: Tensor) -> str | None:
    if (reason := _tensor_obstacle("the input", x)) is not None:
        return reason
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    weight = fast.frozen_weight(layer._modules["base_layer"])
    others = [
        layer._modules[half]._modules[name]._parameters["weight"] for half in ("lora_A", "lora_B") for name in names
    ]
    if any(tensor.device != x.device for tensor in (weight, *others)):
        return "tensors on several devices"
    if not torch.is_autocast_enabled(x.device.type):
        return None if weight.dtype in (x.dtype, torch.int8) else "the input's dtype is not the weight's"
    # Autocast leaves float64 alone, and two 16-bit dtypes meet in float32.
    plain = x.dtype in (torch.float32, torch.get_autocast_dtype(x.device.type)) and weight.dtype != torch.float64
    return None if plain else f"autocast from {x.dtype}"


def _compute(fast: type[OnOps], layer: Any, x: Tensor) -> Tensor:
    """The layer's output, in the dtype that PEFT gives it: the input's or, of a dense layer in autocast, autocast's."""
    base = layer._modules["base_layer"]
    weight, weight_scale, dtype = fast.frozen_weight(base), fast.weight_scale(base), x.dtype
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = base._parameters["bias"]
    trained = bias if bias is not None and bias.requires_grad else None
    y = ops.lora_linear(x, weight, weight_scale, None if trained is not None else bias, *_branch(layer, x))
    if trained is not None:
        y = y + trained.to(y.dtype)
    return y if weight_scale is None else y.to(dtype)


def _branch(layer: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, float, float, Tensor | None]:
    """a, b, scale, p and seed of the active adapter, if any."""
    modules, names = layer._modules, _adapters(layer)
    if not names:
        return None, None, 1.0, 0.0, None
    name = names[0]
    a, b = (modules[half]._modules[name]._parameters["weight"] for half in ("lora_A", "lora_B"))
    dropout = modules["lora_dropout"]._modules[name]
    p = dropout.p if dropout.training and type(dropout) is nn.Dropout else 0.0
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 else None
    scale = layer.scaling[name]
    if isinstance(scale, Tensor):  # PEFT's hot swapping into compiled models
        return a, b.to(torch.promote_types(b.dtype, torch.float32)) * scale, 1.0, p, seed
    return a, b, scale, p, seed


@functools.cache
def _log_fallback(reason: str) -> None:
    """Says once per reason that a call went to PEFT's forward."""
    logger.info("LoRA layers run as PEFT runs them: %s", reason)
