"""Modules whose own parameters are read with adapters in them.

Such a module gets a class with a property for each of these parameters. The parameters keep their names and places.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .adapted import AdaptedWeight, Term, teach_dynamo
from .base import LoraLayer, rebind_hooked_forward

# How transformers' experts compute in torch; the others hand their weights to kernels of their own.
TORCH_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")


class WeightLayer(LoraLayer):
    """A LoRA layer whose adapters are added to weights that a module multiplies by itself.

    No low-rank part has an input of its own there, so none of it can be dropped.
    """

    def terms(self, name: str) -> list[Term]:
        """What the running adapters add to the parameter of a name, in the module that reads it."""
        raise NotImplementedError

    def computed_by(self) -> str:
        return "the modules' own products, in PyTorch"

    @classmethod
    def check(cls, module: Any, name: str, rank: int, dropout: float, dora: bool, bias: bool) -> None:
        for setting, value in (("lora_dropout", dropout), ("use_dora", dora), ("lora_bias", bias)):
            if value:
                raise ValueError(
                    f"{setting}: expected none at {name!r}, whose weight alone is adapted, found {value!r}"
                )


class Reader(nn.Module):
    """The forward of a module that reads its parameters through adapters.

    There a parameter is an `AdaptedWeight`, if that module is known to do nothing with it but multiply; else, and for
    every other reader, it is the sum, a tensor.

    Attributes:
        adapted_by: the LoRA layer that adapts each parameter, by the parameter's name.
        adapted_reads: what this forward has read so far, by name and whether autograd records; None outside of it.
    """

    original_forward_class: type[nn.Module]
    adapted_by: dict[str, Any]
    adapted_reads: dict[tuple[str, bool], Any] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.adapted_reads = {}
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.adapted_reads = None


def _read(module: Any, name: str) -> Any:
    """A parameter with the running adapters in it; a part of one, which only FSDP2 asks for, as it is."""
    parameter = module._parameters[name]
    if ops.is_dtensor(parameter):
        return parameter
    terms = module.adapted_by[name].terms(name)
    if not terms:
        return parameter
    if module.adapted_reads is None:
        return AdaptedWeight(parameter, terms).dense()
    key = name, torch.is_grad_enabled()
    if key not in module.adapted_reads:
        adapted = AdaptedWeight(parameter, terms)
        module.adapted_reads[key] = adapted if _only_multiplies(module, parameter) else adapted.dense()
    return module.adapted_reads[key]


def _only_multiplies(module: Any, parameter: Tensor) -> bool:
    """Whether the module's own forward is one of torch or transformers that leaves products to torch."""
    original = module.original_forward_class
    if issubclass(original, nn.MultiheadAttention) or original.forward is nn.Linear.forward:
        return True
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    return original.__module__.startswith("transformers.") and parameter.dim() == 3 and implementation in TORCH_EXPERTS


def adapt_parameter(module: Any, name: str, layer: WeightLayer) -> None:
    """Makes a parameter of a module read through a LoRA layer."""
    teach_dynamo()
    module.__dict__.setdefault("adapted_by", {})[name] = layer
    module.__dict__["adapted_reads"] = None
    _set_class(module, getattr(module, "original_forward_class", type(module)))


def release_parameter(module: Any, name: str) -> None:
    """Undoes `adapt_parameter`."""
    original = module.original_forward_class
    del module.adapted_by[name]
    if not module.adapted_by:
        del module.__dict__["adapted_by"], module.__dict__["adapted_reads"]
    _set_class(module, original)


def _set_class(module: Any, original: Any) -> None:
    names = tuple(sorted(module.__dict__.get("adapted_by", ())))
    module.__class__ = _reader_class(original, names) if names else original
    rebind_hooked_forward(module)


@functools.cache
def _reader_class(original: Any, names: tuple[str, ...]) -> type[Reader]:
    members: dict[str, Any] = {name: _property(name) for name in names}
    members |= {"original_forward_class": original, "__module__": original.__module__}
    return type(f"Adapted{original.__name__}", (Reader, original), members)


def _property(name: str) -> property:
    return property(lambda module: _read(module, name))
