"""Which adapters a model has, which one is active, and what of the model trains."""

from __future__ import annotations

from collections.abc import Iterator
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


def set_adapter(model: nn.Module, name: str) -> None:
    """Makes one adapter the active one; it trains as it did, the others keep their weights.

    Raises:
        ValueError: there is no adapter of that name, or one is merged.
    """
    if name not in adapters(model):
        raise ValueError(f"adapter: expected one of {sorted(adapters(model))}, found {name!r}")
    layers = lora_layers(model).values()
    if any(layer.merged_adapter is not None for layer in layers):
        raise ValueError("adapter: expected an unmerged model; call fastlora.unmerge(model) first")
    for layer in layers:
        layer.active_adapter = name if name in layer.lora_A else None


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The frozen model without its adapters, merged or not, inside a `with` block."""
    layers = patched_layers(model).values()
    before = [layer.adapters_enabled for layer in layers]
    for layer in layers:
        layer.adapters_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapters_enabled = enabled


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters train, and how many there are."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints the counts of `trainable_parameters` in PEFT's words."""
    trainable, total = trainable_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")
