"""Models whose layers are repeated (`layer_replication`): repeats share frozen weights and have adapters of their own.

A model of layers 0 to n - 1 becomes one of the layers that the ranges name, in order, as in SOLAR's depth up-scaling
(Kim et al. 2023), at the memory of the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from ..config import LoraConfig

_BEFORE = "fastlora_before_replication"


class _Before(NamedTuple):
    """What `replicated` replaced: the attribute of a module, its layers, and what of them trained."""

    holder: nn.Module
    attribute: str
    layers: nn.ModuleList
    trained: list[tuple[nn.Parameter, bool]]


def check_replication(model: nn.Module, config: LoraConfig, others: Any) -> None:
    """Raises ValueError where the layers cannot become those that the config asks for.

    Args:
        others: the adapters that the model has already, which need the layers that it has.
    """
    if not config.layer_replication:
        return
    if others:
        raise ValueError(f"layer_replication: expected a model without adapters, found {sorted(others)}")
    _, attribute, layers = _find_layers(model)
    for bounds in config.layer_replication:
        whole = len(bounds) == 2 and all(isinstance(bound, int) for bound in bounds)
        if not whole or not 0 <= bounds[0] < bounds[1] <= len(layers):
            raise ValueError(
                f"layer_replication: expected ranges [start, end) within the {len(layers)} {attribute}, found {bounds}"
            )


@contextmanager
def replicated(model: nn.Module, config: LoraConfig, others: Any) -> Iterator[None]:
    """Makes the model's layers those that the config's ranges name; they are as they were where the block fails.

    Raises:
        ValueError: as `check_replication`.
    """
    check_replication(model, config, others)
    if not config.layer_replication:
        yield
        return
    _replicate(model, config.layer_replication)
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            undo_replication(model)


def _replicate(model: nn.Module, ranges: list) -> None:
    holder, attribute, layers = _find_layers(model)
    order = [index for start, end in ranges for index in range(start, end)]
    trained = [(parameter, parameter.requires_grad) for parameter in layers.parameters()]
    model.__dict__[_BEFORE] = _Before(holder, attribute, layers, trained)
    setattr(holder, attribute, nn.ModuleList(_repeat(layers[index], place) for place, index in enumerate(order)))
    _set_count(model, len(order))


def undo_replication(model: nn.Module, keep: bool = False) -> None:
    """Gives the model its layers again, or forgets about them if `keep`."""
    before: _Before | None = model.__dict__.pop(_BEFORE, None)
    if before is None or keep:
        return
    setattr(before.holder, before.attribute, before.layers)
    for parameter, requires_grad in before.trained:
        parameter.requires_grad_(requires_grad)
    _set_count(model, len(before.layers))


def _repeat(layer: nn.Module, place: int) -> nn.Module:
    """A copy of a layer that shares its parameters and buffers, for a place among the layers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*layer.parameters(), *layer.buffers()]}
    repeated = copy.deepcopy(layer, memo)
    for module in repeated.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.__dict__["layer_idx"] = place  # where a cache keeps the layer's keys and values
    return repeated


def _find_layers(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that has the model's layers, the attribute, and the layers."""
    base: Any = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    for holder, attribute in ((base, "layers"), (base, "h"), (getattr(base, "encoder", None), "layer")):
        layers = getattr(holder, attribute, None)
        if holder is not None and isinstance(layers, nn.ModuleList):
            return holder, attribute, layers
    raise ValueError(f"layer_replication: expected a model with a list of layers, found {type(model).__name__}")


def _set_count(model: nn.Module, count: int) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "num_hidden_layers", None) is not None:
        config.num_hidden_layers = count
