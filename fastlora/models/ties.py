"""Weights that modules share, and what folding an adapter into one of them does to the others.

An adapter on an input embedding changes that embedding, and not the output head that shares its weight. PEFT folds it
into the one tensor and so into the head. Here the embedding gets a tensor of its own, and the model's config says so,
for those who save the model; with more than two modules on one weight there is no such way to save it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters.registry import patched_layers
from ..layers import TokenLayer
from ..log import logger
from .ends import input_embedding, output_embedding

_UNTIED = "fastlora_untied"


def check_foldable(model: nn.Module) -> None:
    """Raises ValueError where active adapters cannot be folded into their layers' weights, or not as finite ones."""
    names, layers = _names_by_weight(model), patched_layers(model)
    for name, layer in layers.items():
        if not layer.adapters_to_merge():
            continue
        try:
            layer.check_merge()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        # Another layer with adapters, such as a repeat of this one, gets a folded weight of its own.
        sharing = names[id(layer._parameters.get("weight"))]
        others = [other for other in sharing if other != name and other not in layers]
        if len(others) > 1 and not isinstance(layer, TokenLayer):  # whose rows all of them use
            raise ValueError(
                f"merge: expected at most two modules with one weight, found {name!r}, which has an adapter, and "
                f"{others}; load the model with tie_word_embeddings=False"
            )


def _names_by_weight(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {id(None): []}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            names.setdefault(id(weight), []).append(name)
    return names


def tie_config(model: nn.Module) -> None:
    """Undoes `untie_config`."""
    for settings in model.__dict__.pop(_UNTIED, []):
        settings.tie_word_embeddings = True


def untie_config(model: nn.Module, for_good: bool = False) -> None:
    """Makes the config of a merged model say so where its input embedding no longer is its output head.

    Args:
        for_good: whether there is no `tie_config` to come.
    """
    _untie(model)
    if for_good:
        model.__dict__.pop(_UNTIED, None)


def _untie(model: nn.Module) -> None:
    ends = input_embedding(model), output_embedding(model)
    if None in ends or len({id(end._parameters.get("weight")) for end in ends if end is not None}) == 1:
        return
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    untied = [settings for settings in (config, text) if getattr(settings, "tie_word_embeddings", False)]
    for settings in untied:
        settings.tie_word_embeddings = False
    if untied:
        logger.warning("the merged input embedding is not the output head any more: tie_word_embeddings is False now")
        model.__dict__[_UNTIED] = untied
