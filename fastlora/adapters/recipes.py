"""Ways to train LoRA adapters that need nothing but other parameter groups or fewer trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .registry import adapters, check_known, lora_layers, patched_layers
from .trained import copies_of


def loraplus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0, embedding_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer in which B learns `ratio` times as fast as A (LoRA+, Hayou et al. 2024).

    Everything that trains is in one group, as in PEFT's `create_loraplus_optimizer`: biases and other parameters of
    one axis learn at B's rate without decay, and whatever else trains at A's.

    Args:
        lr: A's learning rate.
        ratio: B's learning rate over A's; the paper recommends about 16.
        weight_decay: the decay of everything but parameters of one axis.
        embedding_lr: the rate of what trains in embedding layers; None treats it as everything else. PEFT: 1e-6.

    Returns:
        Dicts with "params", "lr" and "weight_decay", none of them empty.

    Raises:
        ValueError: a rate, the ratio or the decay is negative, or nothing trains.
    """
    for name, value in dict(lr=lr, ratio=ratio, weight_decay=weight_decay, embedding_lr=embedding_lr or 0.0).items():
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, found {value!r}")
    found = [layer.parameters_of("lora_B") for layer in lora_layers(model).values()]
    b = {id(parameter) for by_name in found for parameters in by_name.values() for parameter in parameters}
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embedded = {id(parameter) for module in embeddings for parameter in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if embedding_lr is not None and id(parameter) in embedded:
            settings = embedding_lr, weight_decay
        elif parameter.dim() <= 1:
            settings = lr * ratio, 0.0
        else:
            settings = lr * ratio if id(parameter) in b else lr, weight_decay
        groups.setdefault(settings, []).append(parameter)
    if not groups:
        raise ValueError("model: expected parameters that train, found none")
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]


def adapter_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer in which every adapter learns at its own rate.

    An optimizer keeps its state by parameter, so adapters that train in one run share none of it. Parameters of one
    axis, such as biases, do not decay. Behind `fully_shard`, which makes new parameters, the groups are made anew.

    Args:
        rates: the learning rate of each adapter that trains, by name.

    Returns:
        Dicts with "params", "lr", "weight_decay" and "adapter", the name; one or two for each adapter.

    Raises:
        ValueError: an adapter is unknown, does not train, or trains and has no rate; or a rate or the decay is
            negative.
    """
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, found {value!r}")
    patched_layers(model)
    trained = {name: _trained_parameters(model, name) for name in adapters(model)}
    for name in rates:
        check_known(model, name)
        if not trained[name]:
            raise ValueError(f"rates: expected adapters that train, found {name!r}, which is frozen")
    missing = [name for name, parameters in trained.items() if parameters and name not in rates]
    if missing:
        raise ValueError(f"rates: expected one for each adapter that trains, found none for {missing}")
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name in rates:
        for parameter in trained[name]:
            groups.setdefault((name, weight_decay if parameter.dim() > 1 else 0.0), []).append(parameter)
    return [
        {"params": members, "lr": rates[name], "weight_decay": decay, "adapter": name}
        for (name, decay), members in groups.items()
    ]


def _trained_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """What trains of an adapter, each parameter once."""
    found = [p for layer in lora_layers(model).values() if layer.has(adapter) for p in layer.parts(adapter).values()]
    found += copies_of(model, adapter).values()
    return [parameter for parameter in found if parameter.requires_grad]


def freeze_a(model: nn.Module, adapter: str | None = None) -> nn.Module:
    """Trains B alone (LoRA-FA, Zhang et al. 2023): a layer then keeps `A x` for its backward, and not x.

    Only the frozen A is LoRA-FA's here; the correction of B's gradient that PEFT's optimizer adds is not.

    Args:
        adapter: whose A is frozen; None means every adapter's.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched, or has no adapter of that name.
    """
    layers = patched_layers(model)
    if adapter is not None and adapter not in adapters(model):
        raise ValueError(f"adapter: expected one of {sorted(adapters(model))}, found {adapter!r}")
    for layer in layers.values():
        for name, parameters in layer.parameters_of("lora_A").items():
            for a in parameters if adapter in (None, name) else ():
                a.requires_grad_(False)
    return model
