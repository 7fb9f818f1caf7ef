"""Ways to train LoRA adapters that need nothing but other parameter groups or fewer trainable parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from .registry import adapters, lora_layers, patched_layers


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
