"""Which adapters a model has, which one is active, and what of the model trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from ..config import LoraConfig
from ..layers import LoraLayer
from ..models.distributed import check_whole
from ..models.targets import scaling_of
from . import trained

REGISTRY = "fastlora_adapters"
ACTIVE = "fastlora_active"


def adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """The adapters of a patched model: its configs by adapter name; empty for a model that is not patched."""
    return model.__dict__.get(REGISTRY, {})


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def patched_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The LoRA layers of a model that has some.

    Raises:
        ValueError: the model has none, or is only a part of the patched one or something around it.
    """
    layers = lora_layers(model)
    if not layers:
        advice = "; it keeps PEFT's methods for that" if callable(getattr(model, "add_weighted_adapter", None)) else ""
        raise ValueError(
            f"model: expected one that was patched, found {type(model).__name__} without LoRA layers{advice}"
        )
    if not adapters(model):
        raise ValueError(
            f"model: expected the one that was patched, found {type(model).__name__} with its layers; of what is "
            "wrapped, as by DistributedDataParallel, pass the model inside, `wrapper.module`"
        )
    return layers


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters in use, in order."""
    return model.__dict__.get(ACTIVE, ())


def set_adapter(model: nn.Module, names: str | Sequence[str]) -> None:
    """Makes adapters the active ones, whose low-rank parts add up; all train as they did and keep their weights.

    Raises:
        ValueError: there is no adapter of that name, one is named twice, one is merged, or two of them have
            modules, biases or tokens of their own.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        check_known(model, name)
    if len(set(names)) < len(names):
        raise ValueError(f"adapter: expected each name once, found {list(names)}")
    check_unmerged(model)
    trained.check_activatable(model, names)
    for layer in lora_layers(model).values():
        layer.check_active(tuple(name for name in names if layer.has(name)))
    _activate(model, names)


def _activate(model: nn.Module, names: tuple[str, ...]) -> None:
    model.__dict__[ACTIVE] = names
    for layer in lora_layers(model).values():
        layer.active_adapters = tuple(name for name in names if layer.has(name))
    trained.put_in_place(model, names)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Takes an adapter off and frees its memory. Where none is left active, the first that remains is.

    Raises:
        ValueError: there is no adapter of that name, or one is merged.
    """
    check_known(model, name)
    check_unmerged(model)
    check_whole(model)
    del adapters(model)[name]
    remaining = tuple(active for active in active_adapters(model) if active != name) or tuple(adapters(model))[:1]
    _activate(model, remaining)
    for layer in lora_layers(model).values():
        layer.delete_adapter(name)
    trained.forget(model, name)


def rename_adapter(model: nn.Module, old: str, new: str) -> None:
    """Gives an adapter another name.

    Raises:
        ValueError: there is no adapter of the old name, there is one of the new, or one is merged.
    """
    check_known(model, old)
    check_new_name(model, new)
    check_unmerged(model)
    check_whole(model)
    configs = adapters(model)
    renamed = {new if name == old else name: config for name, config in configs.items()}
    configs.clear()
    configs.update(renamed)
    for layer in lora_layers(model).values():
        layer.rename_adapter(old, new)
    trained.forget(model, old, new)
    model.__dict__[ACTIVE] = tuple(new if name == old else name for name in active_adapters(model))


def set_scale(model: nn.Module, name: str, factor: float) -> None:
    """Scales an adapter's low-rank part to `factor` times what its config says, until set again.

    Raises:
        ValueError: there is no adapter of that name, one is merged, or the factor is not finite.
    """
    check_known(model, name)
    check_unmerged(model)
    if not math.isfinite(factor):
        raise ValueError(f"factor: expected a finite number, found {factor}")
    config = adapters(model)[name]
    for path, layer in lora_layers(model).items():
        if layer.has(name):
            layer.scaling[name] = factor * scaling_of(config, layer.name_in_config(path))


def check_addable(model: nn.Module, name: str) -> None:
    """Raises ValueError where the model cannot take a new adapter of this name."""
    check_new_name(model, name)
    check_unmerged(model)
    check_whole(model, "patch and load before fully_shard; fastlora.hotswap writes into the adapters that are there")
    check_original_weights(model)


def check_new_name(model: nn.Module, name: str) -> None:
    """Raises ValueError where the model cannot take an adapter of this name."""
    if name in adapters(model):
        raise ValueError(f"adapter: expected a new name, found {name!r}, which the model has already")
    if not name or "." in name:
        raise ValueError(f"adapter: expected a name without dots, found {name!r}")


def check_known(model: nn.Module, name: str) -> None:
    """Raises ValueError where the model has no adapter of this name."""
    if name not in adapters(model):
        raise ValueError(f"adapter: expected one of {sorted(adapters(model))}, found {name!r}")


def check_original_weights(model: nn.Module) -> None:
    """Raises ValueError where an adapter's initialisation changed the frozen weights, so that no other fits them."""
    if any(getattr(layer, "original", None) is not None for layer in lora_layers(model).values()):
        raise ValueError(
            f"model: expected its original weights, found what the initialisation of {sorted(adapters(model))} left of "
            "them; save that adapter, unload it and load it again to have it beside others"
        )


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
    if any(layer.merged_adapters or getattr(layer, "original", None) is not None for layer in switched):
        check_whole(model, "in shards, weights that an adapter has changed cannot be exchanged for the original ones")
    for layer in switched:
        layer.check_base_kept("disabled")
    for layer in switched:
        layer.disable()
    try:
        with trained.originals_in_place(model, active_adapters(model) if switched else ()):
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
