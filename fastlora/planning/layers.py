"""Layers that repeat: a step of a model with two of a kind tells what a step with eighty needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

FEWEST = 4  # a shorter list is run as it is
POSITIONS = {"layer_idx", "layer_id", "layer_number", "layer_index", "training"}  # attributes that say which, not what


@dataclass(frozen=True)
class Repeated:
    """A list of layers.

    Attributes:
        path: the list's name in the model.
        kinds: indices of the layers by kind, the first layer left out, as what comes before it differs.
    """

    path: str
    kinds: list[list[int]]


def find_repeated(model: nn.Module) -> list[Repeated]:
    """The outermost lists of layers, where leaving some out saves any work."""
    found: list[Repeated] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer.path}.") for outer in found)
        if inside or not isinstance(module, nn.ModuleList) or len(module) < FEWEST:
            continue
        kinds: dict[Any, list[int]] = defaultdict(list)
        for index, layer in enumerate(module):
            if index:
                kinds[_signature(layer)].append(index)
        if any(len(indices) > 2 for indices in kinds.values()):
            found.append(Repeated(path, list(kinds.values())))
    return found


def _signature(layer: nn.Module) -> Any:
    """What makes two layers need the same memory: their classes, their tensors and their settings."""
    parts = []
    for name, module in layer.named_modules():
        tensors = [(key, t.shape, t.dtype, t.requires_grad) for key, t in module._parameters.items() if t is not None]
        settings = [
            (key, value) for key, value in vars(module).items()
            if isinstance(value, (int, float, str)) and key not in POSITIONS
        ]  # fmt: skip
        parts.append((name, type(module), tuple(tensors), tuple(settings)))
    return tuple(parts)


@contextmanager
def only(model: nn.Module, kept: dict[str, list[int]]) -> Iterator[None]:
    """The model with these layers of its lists alone, inside a `with` block."""
    before = {path: model.get_submodule(path) for path in kept}
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    types: dict[int, Any] = {key: getattr(config, "layer_types", None) for key, config in configs.items()}
    try:
        for path, indices in kept.items():
            layers: Any = before[path]
            _put(model, path, nn.ModuleList([layers[index] for index in indices]))
            for key, config in configs.items():
                # transformers looks the kind of a layer's attention up by the layer's place.
                if types[key] is not None and len(types[key]) == len(layers):
                    config.__dict__["layer_types"] = [types[key][index] for index in indices]
        yield
    finally:
        for path, layers in before.items():
            _put(model, path, layers)
        for key, config in configs.items():
            if types[key] is not None:
                config.__dict__["layer_types"] = types[key]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
