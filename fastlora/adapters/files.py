"""Adapter folders in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..compute import check_compute
from ..config import CONFIG_FILE, PREFIX, LoraConfig
from ..inits import as_saved, initial_for_file, saved_config
from ..inits.conversion import itself
from ..layers import ADAPTABLE, LoraConv1D, LoraLayer, kind_of
from ..layers.base import Parts
from ..log import logger
from ..models.distributed import gathered, in_first_process, is_sharded, keep_shards_alone, rank
from ..models.parameters import places_in_files
from ..models.replication import replicated
from ..models.targets import check_settings, rank_of
from ..patch import attach
from ..quantize import check_quantizable
from . import trained
from .base_embeddings import replace_embeddings, resized_embeddings, take_embeddings
from .registry import adapters, check_addable, patched_layers
from .tokens import take_tokens

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Writes the adapters of a patched model as PEFT does: "default" into `path`, any other into `path/<name>`.

    An adapter whose initialisation changed the frozen weights (PiSSA, OLoRA, CorDA, LoRA-GA) is written for the
    original ones, with twice the rank, as PEFT does with `path_initial_model_for_weight_conversion`.

    Each file is written under a temporary name, synced and renamed, so what was there survives a failure.

    Under DDP, pass the model itself, not what wraps it, in one process or in all. A model that FSDP2 has sharded has
    to be saved by every process: its adapters are gathered, the frozen weights are not, and the first process writes.

    Embeddings that were resized since the base model was saved are written too, as nothing else has their new rows.

    Raises:
        ValueError: the model is not patched, or spread over processes by another engine than FSDP2.
        OSError: the folder cannot be written.
    """
    write_adapters(model, Path(path), is_sharded(model))


def write_adapters(
    model: nn.Module, path: Path, together: bool, value: Callable[[nn.Parameter], Tensor] = itself
) -> None:
    """Does what `save` does, with the values that `value` gives for the adapters' parameters.

    Args:
        together: whether every process calls, of which the first writes.
    """
    layers = patched_layers(model)
    keep_shards_alone(model)
    for adapter, config in adapters(model).items():
        folder = path if adapter == "default" else path / adapter
        own = {name: layer for name, layer in layers.items() if layer.has(adapter)}
        saved = _as_peft_records(saved_config(config, list(own.values())), model, own)
        tensors = adapter_tensors(model, own, adapter, config, value) | gathered(resized_embeddings(model, saved))
        in_first_process(functools.partial(write_folder, folder, tensors, saved), together)


def load(
    model: nn.Module,
    path: str | PathLike[str],
    adapter: str = "default",
    trainable: bool = False,
    *,
    quantize: str | None = None,
    compute: str | None = None,
) -> nn.Module:
    """Puts an adapter folder of PEFT's format on a model, patched or not, and makes the adapter active.

    Where the folder's config names PiSSA, OLoRA or LoftQ, as PEFT writes it, the frozen weights are decomposed or
    quantised again, as PEFT does, and the original ones are kept as in `patch`.

    Embeddings of the base model in the file replace those of the model, until `unload`.

    Args:
        adapter: the name that it gets in this model.
        trainable: whether it trains on; otherwise it is frozen.
        quantize, compute: as in `patch`, for the layers that the adapter is on.

    Returns:
        The same model.

    Raises:
        ValueError: the folder is not an adapter's, or does not fit the model; the model is then as it was.
    """
    check_addable(model, adapter)
    folder = Path(path)
    config = LoraConfig.from_folder(folder)
    tensors = read_tensors(folder)
    with replicated(model, config, adapters(model)):
        _add_saved(model, config, tensors, folder, adapter, trainable, quantize, compute)
    return model


def _add_saved(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], folder: Path, adapter: str, trainable: bool,
    quantize: str | None, compute: str | None,
) -> None:  # fmt: skip
    """Adds an adapter with the tensors of a file, after every check."""
    rows = take_tokens(model, config, tensors, folder)
    embeddings = take_embeddings(model, config, tensors, folder)
    modules, weights, copies = fit(model, config, tensors, folder)
    check_settings(modules, config if trainable else replace(config, lora_dropout=0.0))
    check_quantizable(model, modules, quantize)
    check_compute(modules, quantize, compute)
    _warn_of_another_base(model, config, folder)
    initial = initial_for_file(model, modules, config, folder)
    config = replace(config, inference_mode=not trainable)
    replace_embeddings(model, embeddings, folder)
    attach(model, modules, weights | rows, config, adapter, quantize, trainable, copies, True, initial, compute)


def _as_peft_records(config: LoraConfig, model: nn.Module, layers: Mapping[str, LoraLayer]) -> LoraConfig:
    """The config with what PEFT's file says of the base model."""
    base = config.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    origin = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return replace(
        config,
        base_model_name_or_path=base or None,  # a model made from a config has the name ""
        auto_mapping=origin if config.task_type is None else None,
        fan_in_fan_out=any(isinstance(layer, LoraConv1D) for layer in layers.values()),
    )


def adapter_tensors(
    model: nn.Module, layers: Mapping[str, LoraLayer], adapter: str, config: LoraConfig,
    value: Callable[[nn.Parameter], Tensor] = itself,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of one adapter, which the layers have, under PEFT's names; `value` gives those of parameters."""
    tensors = {}
    for name, layer in layers.items():
        for part, tensor in as_saved(layer, adapter, config, value).items():
            tensors[f"{PREFIX}{layer.name_in_files(name, adapter)}.{part}"] = tensor.contiguous()
    copies = {name: value(copy) for name, copy in trained.copies_in_all_places(model, adapter).items()}
    for name, copy in gathered(copies).items():
        path, _, attribute = name.rpartition(".")
        base = "base_layer." if path in layers else ""
        # A copy that stands in two places is in the file twice, as in PEFT's, which safetensors wants apart.
        tensors[f"{PREFIX}{path}.{base}{attribute}"] = copy.clone()
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder.

    Raises:
        ValueError: there is no safetensors file, only a pickle, or the file is damaged.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / PICKLE_FILE).is_file():
            raise ValueError(
                f"path: expected {WEIGHTS_FILE}, found {PICKLE_FILE} in {str(folder)!r}, a pickle, which can run any "
                "code and is never read; where you trust it, load it with PEFT and save it again with "
                "save_pretrained(path, safe_serialization=True)"
            )
        raise ValueError(f"path: expected a folder with {WEIGHTS_FILE}, found none in {str(folder)!r}")
    try:
        with safe_open(file, framework="pt") as reader:
            names = reader.keys()  # the reader is no mapping
            return {name: reader.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, found {error}") from None


def fit(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Parts], dict[str, Tensor]]:
    """The modules that the tensors belong to, their tensors by part, and those of trained copies, all checked."""
    places = places_in_files(model, config)
    modules: dict[str, Any] = {}
    parts: dict[str, Parts] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, is_part, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX):
            raise ValueError(f"{folder}: expected keys of LoRA weights, found {key!r}")
        if not is_part:
            others[key.removeprefix(PREFIX).replace(".base_layer.", ".")] = tensor
            continue
        if name not in places:
            base = config.base_model_name_or_path
            raise ValueError(f"{folder}: expected an adapter for this model, found weights for {name!r} of {base!r}")
        place = places[name]
        modules[place.target] = place.module
        parts.setdefault(place.target, {})[f"{place.prefix}lora_{part}"] = tensor
    if not parts:
        raise ValueError(f"{folder}: expected LoRA weights, found an empty file")
    for name, found in parts.items():
        _check_parts(name, modules[name], found, config, folder)
    _check_copies(model, config, list(parts), others, folder)
    return modules, parts, others


def _check_copies(
    model: nn.Module, config: LoraConfig, targets: list[str], copies: dict[str, Tensor], folder: Path
) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = trained.names_to_train(model, config, targets)
    owners = {id(parameters[name]) for name in wanted}
    elsewhere = {name for name in copies if name in parameters and id(parameters[name]) in owners}
    shapes = {name: list(parameters[name].shape) for name in wanted}
    # A parameter that stands in two places may be in the file twice, as PEFT writes it.
    _check_tensors(shapes, {n: t for n, t in copies.items() if n in shapes or n not in elsewhere}, folder)


def _check_parts(name: str, module: Any, parts: Parts, config: LoraConfig, folder: Path) -> None:
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"{folder}: expected {ADAPTABLE} at {name!r}, found {type(module).__name__}")
    shapes = kind.shapes(module, rank_of(config, name))
    optional = {"lora_B.bias": config.lora_bias, "lora_magnitude_vector": config.use_dora}
    shapes = {part: shape for part, shape in shapes.items() if optional.get(part, True)}
    _check_tensors(shapes, parts, folder, name)


def _check_tensors(
    shapes: dict[str, list[int]], tensors: dict[str, Tensor], folder: Path, owner: str | None = None
) -> None:
    """Raises ValueError unless the tensors have just these names and shapes and are finite."""
    of_owner, in_owner = ("", "") if owner is None else (f" for {owner!r}", f" of {owner!r}")
    for name in sorted(shapes.keys() | tensors.keys()):
        expected = shapes.get(name, "none")
        found = list(tensors[name].shape) if name in tensors else "none"
        if found != expected:
            raise ValueError(f"{folder}: expected {name} of shape {expected}{of_owner}, found {found}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"{folder}: expected finite weights, found inf or nan in {name}{in_owner}")


def _warn_of_another_base(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """The shapes fit, so the name may just be another path to the same model: this is no error."""
    found, wanted = getattr(getattr(model, "config", None), "_name_or_path", None), config.base_model_name_or_path
    if found and wanted and Path(found).name != Path(wanted).name:
        logger.warning("%s: the adapter was made for %r, and is put on %r", folder, wanted, found)


def write_folder(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Writes an adapter folder: tensors under PEFT's names and their config, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    # Several processes may write one folder at once: each its own files, with the same content.
    weights, settings = folder / f".{WEIGHTS_FILE}.{rank()}.tmp", folder / f".{CONFIG_FILE}.{rank()}.tmp"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(config.to_json(), encoding="utf-8")
        for temporary in (weights, settings):
            sync(temporary)
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(settings, folder / CONFIG_FILE)
        sync(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written: {error}") from error
    finally:
        weights.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
