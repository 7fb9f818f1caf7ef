"""Linear layers with LoRA adapters.

A model's own module becomes a LoRA layer by changing its class: it keeps its identity, its place, its hooks and
its parameters' names, and changing the class back undoes it.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..pages import release_pages
from .bitsandbytes import is_linear8bit, restore_linear8bit, take_int8
from .original import Original, original_weight, restore_weight

# Subclasses of nn.Linear whose forward differs from it in nothing but the way it is written.
EQUIVALENT_LINEARS = {"FalconLinear"}


class LoraLayer(nn.Module):
    """A frozen linear layer `W x + bias`, dense or int8, with named LoRA adapters of which one is active.

    Attributes:
        weight: the frozen weight; int8 `[N, K]` where `weight_scale` is not None.
        weight_scale: float `[N]` for an int8 weight, else None.
        lora_A, lora_B: parameters by adapter name, `[R, K]` and `[N, R]`.
        scaling, lora_dropout: the factor of `B A` and the dropout probability by adapter name.
        active_adapter: the adapter in use, or None.
        adapters_enabled: False while adapters are switched off.
        merged_adapter: the adapter folded into `weight`, or None.
        original_class: the module's class before it became a LoRA layer.
        dense_dtype: the dtype of the weight before it was quantised.
        original: the weight from before an adapter's initialisation changed it, where one did.
    """

    in_features: Any
    out_features: Any
    weight: Any
    weight_scale: nn.Parameter | None
    bias: Any
    lora_A: nn.ParameterDict
    lora_B: nn.ParameterDict
    scaling: dict[str, float]
    lora_dropout: dict[str, float]
    active_adapter: str | None
    adapters_enabled: bool
    merged_adapter: str | None
    original_class: type[nn.Module]
    dense_dtype: torch.dtype
    original: Original | None
    _before_merge: tuple[nn.Parameter, nn.Parameter | None] | None

    @property
    def frozen_weight(self) -> Tensor:
        """The weight as `[N, K]`, merged or not."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        parameters: dict[str, Any] = self._parameters  # nn.Module's attribute lookup costs as much as a small kernel
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != parameters["weight"].dtype and parameters["weight_scale"] is None:
            raise TypeError(f"input: expected {self.weight.dtype}, the dtype of the weight, found {x.dtype}")
        bias = parameters["bias"]
        if bias is None or not bias.requires_grad:
            return self._linear(x, bias)
        return self._linear(x, None) + bias.to(x.dtype)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight: Tensor = self.frozen_weight
        weight_scale: Tensor | None = self._parameters["weight_scale"]
        adapter = self.active_adapter
        if not self.adapters_enabled:
            weight, weight_scale = self._frozen_before_merge() if self.original is None else original_weight(self)
        if adapter is None or self.merged_adapter is not None or not self.adapters_enabled:
            if weight_scale is None:
                return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            return ops.lora_linear(x, weight, weight_scale, bias)
        p = self.lora_dropout[adapter] if self.training else 0.0
        seed = torch.randint(2**63 - 1, (1,), device=x.device) if p > 0 else None
        modules: dict[str, Any] = self._modules
        a, b = modules["lora_A"]._parameters[adapter], modules["lora_B"]._parameters[adapter]
        return ops.lora_linear(x, weight, weight_scale, bias, a, b, self.scaling[adapter], p, seed)

    def add_adapter(self, name: str, a: Tensor, b: Tensor, scaling: float, dropout: float) -> None:
        """Adds an adapter, on the device of the weight; 16-bit models get float32 adapters, as in PEFT."""
        dtype = torch.promote_types(self.dense_dtype, torch.float32)
        self.lora_A[name] = nn.Parameter(a.to(self.weight.device, dtype))
        self.lora_B[name] = nn.Parameter(b.to(self.weight.device, dtype))
        self.scaling[name], self.lora_dropout[name] = scaling, dropout

    def quantize(self) -> None:
        """Replaces the dense weight by int8 codes and a scale per output feature."""
        dense = self.weight.data
        self.set_int8(*ops.quantize_rows(self.frozen_weight))
        release_pages(dense)

    def set_int8(self, q: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(q, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    def dense_weight(self, adapter: str | None = None) -> Tensor:
        """The frozen weight as the original module stores it, with an adapter folded in where one is named."""
        weight, weight_scale = self._frozen_before_merge()
        if weight_scale is not None:
            weight = weight.float() * weight_scale.float()[:, None]
        if adapter is not None:
            a, b = self.lora_A[adapter].detach(), self.lora_B[adapter].detach()
            weight, _ = ops.merge_rows(weight, None, a, b, self.scaling[adapter])
        return self._stored(weight.to(self.dense_dtype))

    def merge(self) -> None:
        """Folds the active adapter into the weight; the weight before is kept, so that `unmerge` is exact.

        Raises:
            ValueError: the merged weight is not finite.
        """
        adapter = self.active_adapter
        if adapter is None or self.merged_adapter is not None:
            return
        a, b = self.lora_A[adapter].detach(), self.lora_B[adapter].detach()
        before = (self.weight, self.weight_scale)
        weight, scale = ops.merge_rows(self.frozen_weight, self.weight_scale, a, b, self.scaling[adapter])
        if not torch.isfinite(weight if self.weight_scale is None else scale).all():
            raise ValueError(f"adapter {adapter!r}: expected a finite merged weight, found inf or nan")
        if self.weight_scale is None:
            self.weight = nn.Parameter(self._stored(weight), requires_grad=False)
        else:
            self.set_int8(weight, scale)
        self._before_merge, self.merged_adapter = before, adapter

    def unmerge(self) -> None:
        """Gives back the weight from before `merge`, bit for bit."""
        if self._before_merge is None:
            return
        device = self.weight.device
        for parameter in self._before_merge:
            if parameter is not None:
                parameter.data = parameter.data.to(device)
        self.weight, self.weight_scale = self._before_merge
        self._before_merge, self.merged_adapter = None, None

    def release(self, merge: bool = False) -> None:
        """Turns the module back into what it was, with the active adapter folded in if `merge`.

        A weight that fastlora quantised is dequantised; one that came from bitsandbytes stays int8.
        """
        if not merge:
            self.unmerge()
            restore_weight(self)
        if self.original_class.__name__ == "Linear8bitLt":
            if merge:
                self.merge()
            q, scale = self.weight.data, self.weight_scale
            self._become_original()
            restore_linear8bit(self, q, scale)
        elif merge or self.weight_scale is not None:
            weight = self.dense_weight(self.active_adapter if merge else None)
            self._become_original()
            self.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self._become_original()

    def _become_original(self) -> None:
        """Drops everything that `adopt` added."""
        original: Any = self.original_class
        del self.lora_A, self.lora_B
        del self._parameters["weight_scale"]
        for name in _LAYER_STATE:
            del self.__dict__[name]
        self.__class__ = original
        _rebind_hooked_forward(self)

    def _frozen_before_merge(self) -> tuple[Tensor, Tensor | None]:
        """The unmerged weight `[N, K]` and its scale."""
        if self._before_merge is None:
            return self.frozen_weight, self.weight_scale
        weight, scale = self._before_merge
        return (self._stored(weight) if scale is None else weight), scale

    def _stored(self, weight: Tensor) -> Tensor:
        """A dense `[N, K]` weight in the layout of the original module; its own inverse."""
        return weight

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={a.shape[0]}" for name, a in self.lora_A.items())
        kind = str(self.weight.dtype).removeprefix("torch.")
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={kind}, adapters=({ranks})"


_LAYER_STATE = (
    "scaling", "lora_dropout", "active_adapter", "adapters_enabled", "merged_adapter", "original_class",
    "dense_dtype", "original", "_before_merge",
)  # fmt: skip


class LoraLinear(LoraLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with LoRA adapters."""

    @property
    def frozen_weight(self) -> Any:
        return self._parameters["weight"]


class LoraConv1D(LoraLayer):
    """transformers' `Conv1D`, a linear layer whose dense weight is stored as `[K, N]`, with LoRA adapters."""

    @property
    def in_features(self) -> Any:
        return self.nx

    @property
    def out_features(self) -> Any:
        return self.nf

    @property
    def frozen_weight(self) -> Tensor:
        return self.weight.T if self.weight_scale is None else self.weight

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T


def is_adaptable(module: nn.Module) -> bool:
    """Whether `adopt` takes this module."""
    if isinstance(module, LoraLayer):
        return True
    if torch.nn.utils.parametrize.is_parametrized(module):
        return False
    if is_linear8bit(module):
        return True
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward or type(module).__name__ in EQUIVALENT_LINEARS
    return _is_conv1d(module)


def adopt(module: Any) -> LoraLayer:
    """Turns a linear module into a LoRA layer without adapters, in place; one that is already is returned as it is."""
    if isinstance(module, LoraLayer):
        return module
    int8 = take_int8(module) if is_linear8bit(module) else None
    dense_dtype = torch.float16 if is_linear8bit(module) else module.weight.dtype
    state: dict[str, Any] = dict(
        scaling={}, lora_dropout={}, active_adapter=None, adapters_enabled=True, merged_adapter=None,
        original_class=type(module), dense_dtype=dense_dtype, original=None, _before_merge=None,
    )  # fmt: skip
    module.__class__ = LoraConv1D if _is_conv1d(module) else LoraLinear
    module.__dict__.update(state)
    module.register_parameter("weight_scale", None)
    module.lora_A, module.lora_B = nn.ParameterDict(), nn.ParameterDict()
    if int8 is not None:
        module.set_int8(*int8)
    _rebind_hooked_forward(module)
    return module


def _is_conv1d(module: nn.Module) -> bool:
    # A model with a Conv1D has imported transformers; fastlora need not.
    transformers_layers = sys.modules.get("transformers.pytorch_utils")
    return transformers_layers is not None and isinstance(module, transformers_layers.Conv1D)


def _rebind_hooked_forward(module: Any) -> None:
    """accelerate's device hooks keep the forward they wrap on the instance: make that the class's present one."""
    if "_old_forward" in module.__dict__:
        module._old_forward = types.MethodType(type(module).forward, module)
