"""A model's modules, those that repeat on one line: what computes each, what trains there, and how large it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import LoraLayer, LoraParameter
from ..ops import Place


@dataclass(frozen=True)
class Row:
    """Modules that differ in nothing but the layer they are in.

    Attributes:
        name: their name in the model, `*` for the number of a layer.
        count: how many there are.
        kind: the class they had before they were adapted.
        shape: that of the weight, `[out_features, in_features]` where it is linear.
        stored: the dtype of the weight in memory.
        rank: of the active adapters together, 0 without.
        parameters: numbers in all of them, adapters included; a tensor that is in two places counts at the first.
        trainable: how many of these train.
        bytes: of these and of buffers.
        computed_by: what computes them, in words, and why no kernel does where none does.
    """

    name: str
    count: int
    kind: str
    shape: tuple[int, ...]
    stored: str
    rank: int
    parameters: int
    trainable: int
    bytes: int
    computed_by: str


def find_rows(model: nn.Module, place: Place) -> list[Row]:
    """The rows of a model, in its order, as they would run in a place."""
    owned: dict[str, list[Tensor]] = {}
    seen: set[int] = set()
    for name, tensor in [*_named(model, "_parameters"), *_named(model, "_buffers")]:
        tensors = owned.setdefault(_owner(model, name), [])
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors.append(tensor)
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, module in model.named_modules():
        if name in owned and any(p is not None for p in (module._parameters | _adapters(module)).values()):
            sizes = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in owned[name])
            key = _pattern(name), *_looks(module), _computed_by(module, place), sizes
            groups.setdefault(key, []).append(name)
    return [
        _row(key, [tensor for name in names for tensor in owned[name]], len(names)) for key, names in groups.items()
    ]


def _row(key: tuple[Any, ...], tensors: list[Tensor], count: int) -> Row:
    name, kind, shape, stored, rank, computed_by, _ = key
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    return Row(
        name, count, kind, shape, stored, rank,
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        bytes=sum(tensor.nbytes for tensor in tensors),
        computed_by=computed_by,
    )  # fmt: skip


def _named(model: nn.Module, members: str) -> list[tuple[str, Tensor]]:
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, module in model.named_modules()
        for name, tensor in getattr(module, members).items()
        if tensor is not None
    ]


def _owner(model: nn.Module, name: str) -> str:
    """The module that a tensor belongs to, for an adapter's the layer."""
    path = name.rpartition(".")[0]
    while isinstance(model.get_submodule(path), nn.ParameterDict):
        path = path.rpartition(".")[0]
    return path


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)lora_(?=[^.]+$)", "", re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))


def _adapters(module: nn.Module) -> dict[str, Any]:
    return dict(module.lora_A.items()) if isinstance(module, LoraLayer) else {}


def _looks(module: Any) -> tuple[str, tuple[int, ...], str, int]:
    """The class, the shape and dtype of the weight, and the rank."""
    if isinstance(module, LoraParameter):
        weight = module.weight
        return type(module.target.module).__name__, tuple(weight.shape), _short(weight.dtype), _rank(module)
    weights = [tensor for tensor in module._parameters.values() if tensor is not None]
    weight = max(weights, key=lambda tensor: (tensor.dim(), tensor.numel())) if weights else torch.empty(0)
    if not isinstance(module, LoraLayer):
        kind = getattr(module, "original_forward_class", type(module)).__name__
        return kind, tuple(weight.shape), _short(weight.dtype), 0
    return module.original_class.__name__, tuple(weight.shape), _short(weight.dtype), _rank(module)


def _rank(layer: LoraLayer) -> int:
    """The rank of the running adapters together; the factors of an expert each have it."""
    experts = layer.target.sizes[0] if isinstance(layer, LoraParameter) else 1
    return sum(layer.lora_A[name].shape[0] // experts for name in layer.running_adapters())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _computed_by(module: nn.Module, place: Place) -> str:
    if isinstance(module, LoraLayer):
        return module.computed_by(place)
    trains = any(p.requires_grad for p in module._parameters.values() if p is not None)
    return f"PyTorch, {'trains' if trains else 'frozen'}"
