"""Folding adapters into the frozen weights, and taking them out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .adapters.registry import active_adapters, check_known, patched_layers, set_adapter
from .layers import LoraLayer
from .layers.folding import storage_address
from .log import logger
from .models.distributed import check_whole
from .models.ties import check_foldable, tie_config, untie_config
from .progress import Progress, reported

MIB = 1 << 20

_ON_DISK = "save the adapter and fold it into the model's files with fastlora.merge_checkpoint"


def merge(
    model: nn.Module, adapters: Sequence[str] | None = None, *, keep_base: bool = True, progress: Progress = None
) -> nn.Module:
    """Folds adapters, by default the active ones, into the weights: `W + scale * B A`, int8 again where W is int8.

    The weights from before are kept for `unmerge`, which takes their memory once more: `2 N K` bytes per 16-bit
    layer, `N K + 4 N` per int8 layer. With `keep_base=False` the weights are written over and memory does not grow;
    neither `unmerge` nor `disabled` works then. Besides that, a CPU needs some MiB for a block of rows and a GPU
    some ten; a 4-bit layer is dequantised to float32 while its turn lasts.

    A model that is merged already stays as it is, but for the weights from before, of which `keep_base=False` lets go.
    An input embedding with an adapter gets a weight of its own; an output head that it shared one with keeps the old
    one, and `model.config.tie_word_embeddings` becomes False until `unmerge`.

    Args:
        keep_base: keep the weights from before. Without, an interruption (Ctrl-C) leaves a half-merged model.
        progress: None for a progress bar on a terminal where there is over 1 GiB to merge, False for none, True for
            one on any terminal, or a function that is called with the bytes done and their total.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched or is sharded, its adapters are disabled, there is no adapter of a name,
            one cannot be folded into its layer, or a merged weight would not be finite; nothing is merged then.
    """
    check_whole(model, _ON_DISK)
    layers, before = patched_layers(model), active_adapters(model)
    for layer in layers.values():
        layer.check_enabled("merge")
    if adapters is not None:
        for adapter in adapters:
            check_known(model, adapter)
        set_adapter(model, adapters)
    todo = {name: layer for name, layer in layers.items() if layer.adapters_to_merge()}
    finished = False
    try:
        check_foldable(model)
        _merge_layers(model, todo, keep_base, progress)
        finished = True
    finally:
        if not finished:
            _undo(list(todo.values()))
            if adapters is not None and not any(layer.merged_adapters for layer in layers.values()):
                set_adapter(model, before)
    if not keep_base:
        for layer in layers.values():
            layer.drop_base()
    untie_config(model)
    return model


def _merge_layers(model: nn.Module, layers: dict[str, LoraLayer], keep_base: bool, progress: Progress) -> None:
    untouchable = set() if keep_base else _shared_memory(model)
    sizes = {name: layer.weight_bytes() for name, layer in layers.items()}
    total = sum(sizes.values())
    if keep_base and layers:
        logger.info(
            "merging keeps the weights of %d layers from before, %.1f MiB; keep_base=False does not",
            len(layers), total / MIB,
        )  # fmt: skip
    with reported("merging", total, progress) as advance:
        for name, layer in layers.items():
            layer.merge(keep_base, untouchable)
            advance(sizes[name])


def _undo(layers: list[LoraLayer]) -> None:
    for layer in layers:
        if layer.merged_adapters and layer.keeps_base:
            layer.unmerge()


def _shared_memory(model: nn.Module) -> set[int]:
    """Addresses of the memory that several parameters of the model have, or that other processes or graphs may read."""
    parameters = [
        p for module in model.modules() for p in module._parameters.values()
        if p is not None and not is_traceable_wrapper_subclass(p)  # which has no memory of its own
    ]  # fmt: skip
    users = Counter(storage_address(p) for p in parameters)
    return {
        storage_address(p)
        for p in parameters
        if users[storage_address(p)] > 1 or p.is_inference() or (p.device.type == "cpu" and p.is_shared())
    }


def unmerge(model: nn.Module) -> nn.Module:
    """Gives back the frozen weights from before `merge`, bit for bit, and returns the same model.

    Raises:
        ValueError: the model is not patched, its adapters are disabled, or the weights from before were not kept;
            nothing changes then.
    """
    layers = patched_layers(model).values()
    check_whole(model)
    for layer in layers:
        layer.check_unmerge()
    for layer in layers:
        layer.unmerge()
    tie_config(model)
    return model
