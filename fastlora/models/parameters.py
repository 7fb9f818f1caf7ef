"""Which parameters of a model an adapter goes to, and what PEFT's files call everything that can have one."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import LoraConfig
from ..layers import LoraLayer, LoraParameter, ParameterTarget, is_linear4bit, kind_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Place:
    """Where the tensors of one name in a file belong.

    Attributes:
        target: the name that patterns of the config match.
        module: the module or parameter.
        prefix: what stands before the tensors' names among the layer's parts.
    """

    target: str
    module: Any
    prefix: str


def find_parameters(model: nn.Module, config: LoraConfig) -> dict[str, ParameterTarget]:
    """The parameters that `config.target_parameters` selects, by name: whole names or dotted suffixes, as in PEFT.

    Raises:
        ValueError: nothing is selected, or a parameter that cannot have an adapter.
        TypeError: a parameter is not of a dtype that is computed in.
    """
    wanted = config.target_parameters
    if not wanted:
        return {}
    existing = dict(_parameters(model))
    found = {
        name: target
        for name, target in existing.items()
        if name in wanted or any(name.endswith(f".{suffix}") for suffix in wanted)
    }
    for name, target in found.items():
        _check(name, target)
    if not found:
        near = [hit for name in wanted for hit in difflib.get_close_matches(name, existing, n=1, cutoff=0.0)]
        raise ValueError(f"target_parameters: expected names of parameters, found none for {wanted}; nearest: {near}")
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, ParameterTarget]]:
    """The model's own parameters, in PEFT's order."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.ParameterDict):
            for name, _ in module.named_parameters(recurse=False):
                yield f"{path}.{name}" if path else name, ParameterTarget(module, name)


def _check(name: str, target: ParameterTarget) -> None:
    module, parameter = target.module, target.weight
    if "." not in name:
        raise ValueError(f"target_parameters: expected parameters of submodules, found {name!r} of the model itself")
    adapted_by = module.__dict__.get("adapted_by", {}).get(target.parameter)
    if isinstance(module, LoraLayer) or not isinstance(adapted_by, LoraParameter | None):
        raise ValueError(f"target_parameters: expected modules without adapters of their own, found {name!r}")
    if parameter.dim() not in (2, 3):
        raise ValueError(f"target_parameters: expected 2 or 3 axes, found shape {list(parameter.shape)} at {name!r}")
    if parameter.dtype not in DTYPES or is_linear4bit(module):
        found = "4-bit codes" if is_linear4bit(module) else parameter.dtype
        raise TypeError(f"target_parameters: expected one of {DTYPES}, found {found} at {name!r}")


def places_in_files(model: nn.Module, config: LoraConfig) -> dict[str, Place]:
    """Every module that can have an adapter, and the selected parameters, by the names that PEFT's files give them.

    PEFT wraps a module once per parameter, the last one outermost, so that the first is `X.base_layer.base_layer...`.
    """
    places: dict[str, Place] = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        for part in () if kind is None else kind.PARTS:
            prefix = part[: part.index("lora_")]
            places[f"{name}.{prefix}".rstrip(".")] = Place(name, module, prefix)
        places.setdefault(name, Place(name, module, ""))
    found = list(find_parameters(model, config).items())
    for index, (name, target) in enumerate(found):
        outside = sum(other.module is target.module for _, other in found[index + 1 :])
        places[name.rpartition(".")[0] + ".base_layer" * outside] = Place(name, target, "")
    return places
