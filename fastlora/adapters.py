"""Which adapters a model has, which one is active, and what of the model trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from .config import LoraConfig
from .layers import LoraLayer

REGISTRY = "fastlora_adapters"


def adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """The adapters of a patched model: its configs by adapter name; empty for a model that is not patched."""
    return model.__dict__.get(REGISTRY, {})


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def patched_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model that has some.

    Raises:
        ValueError: the model has none.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"model: expected one that was patched, found {type(model).__name__} without LoRA layers")
    return layers


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes adapters the active ones, whose low-rank parts add up; all train as they did and keep their weights.

    Raises:
        ValueError: there is no adapter of that name, one is named twice, two train the same token, or one is merged.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        check_known(model, name)
    if len(set(names)) < len(names):
        raise ValueError(f"adapter: expected each name once, found {list(names)}")
    check_unmerged(model)
    chosen = {layer: tuple(name for name in names if layer.has(name)) for layer in lora_layers(model).values()}
    for layer, active in chosen.items():
        layer.check_active(active)
    for layer, active in chosen.items():
        layer.active_adapters = active


def check_known(model: nn.Module, name: str) -> None:
    """Raises ValueError where the model has no adapter of this name."""
    if name not in adapters(model):
        raise ValueError(f"adapter: expected one of {sorted(adapters(model))}, found {name!r}")


def check_unmerged(model: nn.Module) -> None:
    """Raises ValueError where an adapter is merged into the model."""
    if any(layer.merged_adapters for layer in lora_layers(model).values()):
        raise ValueError(
            "model: expected an unmerged model, found a merged adapter; call fastlora.unmerge(model) first"
        )


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The frozen model without its adapters, merged or not, inside a `with` block."""
    switched = [layer for layer in patched_layers(model).values() if layer.adapters_enabled]
    for layer in switched:
        layer.disable()
    try:
        yield
    finally:
        for layer in switched:
            layer.enable()


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the counts of `trainable_parameters` in PEFT's words."""
    trainable, total = trainable_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")
