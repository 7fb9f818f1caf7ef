"""Folding adapters into the frozen weights, and taking them out again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .adapters.registry import check_known, patched_layers, set_adapter
from .layers import LoraLayer
from .models.distributed import check_whole
from .models.ties import check_foldable, tie_config, untie_config

_ON_DISK = "save the adapter and fold it into the model's files with fastlora.merge_checkpoint"


def merge(model: nn.Module, adapters: Sequence[str] | None = None) -> nn.Module:
    """Folds adapters, by default the active ones, into the weights: `W + scale * B A`, int8 again where W is int8.

    The weights from before are kept for `unmerge`, so merging takes their memory once more. A model that is
    merged already stays as it is. An input embedding with an adapter gets a weight of its own; an output head that it
    shared one with keeps the old one, and `model.config.tie_word_embeddings` becomes False until `unmerge`.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched or is sharded, there is no adapter of a name, an adapter cannot be
            folded into its layer, or a merged weight would not be finite; nothing is merged then.
    """
    check_whole(model, _ON_DISK)
    if adapters is not None:
        for adapter in adapters:
            check_known(model, adapter)
        set_adapter(model, adapters)
    check_foldable(model)
    todo = {name: layer for name, layer in patched_layers(model).items() if not layer.merged_adapters}
    finished = False
    try:
        for name, layer in todo.items():
            _merge_layer(name, layer)
        finished = True
    finally:
        if not finished:
            for layer in todo.values():
                layer.unmerge()
    untie_config(model)
    return model


def _merge_layer(name: str, layer: LoraLayer) -> None:
    try:
        layer.merge()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def unmerge(model: nn.Module) -> nn.Module:
    """Gives back the frozen weights from before `merge`, bit for bit, and returns the same model.

    Raises:
        ValueError: the model is not patched.
    """
    layers = patched_layers(model).values()
    check_whole(model)
    for layer in layers:
        layer.unmerge()
    tie_config(model)
    return model
