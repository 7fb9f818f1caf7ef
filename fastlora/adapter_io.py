"""Adapter folders in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import adapters, patched_layers
from .config import CONFIG_FILE, LoraConfig
from .layers import LoraConv1D, LoraLayer, kind_of
from .layers.base import Parts
from .log import logger
from .parameters import places_in_files
from .patch import attach, check_new_adapter, rank_of
from .quantize import check_quantizable
from .targets import check_settings

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Writes the adapters of a patched model as PEFT does: "default" into `path`, any other into `path/<name>`.

    Each file is written under a temporary name, synced and renamed, so what was there survives a failure.

    Raises:
        ValueError: the model is not patched.
        OSError: the folder cannot be written.
    """
    layers = patched_layers(model)
    for adapter, config in adapters(model).items():
        folder = Path(path) if adapter == "default" else Path(path, adapter)
        _write_folder(folder, adapter_tensors(layers, adapter), _as_peft_records(config, model, layers, adapter))


def load(
    model: nn.Module,
    path: str | PathLike[str],
    adapter: str = "default",
    trainable: bool = False,
    *,
    quantize: str | None = None,
) -> nn.Module:
    """Puts an adapter folder of PEFT's format on a model, patched or not, and makes the adapter active.

    Args:
        adapter: the name that it gets in this model.
        trainable: whether it trains on; otherwise it is frozen.
        quantize: as in `patch`, for the layers that the adapter is on.

    Returns:
        The same model.

    Raises:
        ValueError: the folder is not an adapter's, or does not fit the model; the model is then as it was.
    """
    check_new_adapter(model, adapter)
    folder = Path(path)
    config = LoraConfig.from_folder(folder)
    tensors = read_tensors(folder)
    modules, weights = _fit(model, config, tensors, folder)
    check_settings(modules, config if trainable else replace(config, lora_dropout=0.0))
    check_quantizable(model, modules, quantize)
    _warn_of_another_base(model, config, folder)
    attach(model, modules, weights, replace(config, inference_mode=not trainable), adapter, quantize, trainable)
    return model


def _as_peft_records(config: LoraConfig, model: nn.Module, layers: Mapping[str, LoraLayer], adapter: str) -> LoraConfig:
    """The config with what PEFT's file says of the base model."""
    base = config.base_model_name_or_path or getattr(getattr(model, "config", None), "_name_or_path", None)
    origin = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return replace(
        config,
        base_model_name_or_path=base or None,  # a model made from a config has the name ""
        auto_mapping=origin if config.task_type is None else None,
        fan_in_fan_out=any(isinstance(layer, LoraConv1D) and layer.has(adapter) for layer in layers.values()),
    )


def adapter_tensors(layers: Mapping[str, LoraLayer], adapter: str) -> dict[str, Tensor]:
    """The tensors of one adapter under PEFT's names."""
    tensors = {}
    for name, layer in layers.items():
        for part, parameter in layer.parts(adapter).items():
            tensors[f"{PREFIX}{layer.name_in_files(name, adapter)}.{part}"] = parameter.detach().contiguous()
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


def _fit(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Parts]]:
    """The modules that the tensors belong to, and their tensors by part, after every check."""
    places = places_in_files(model, config)
    modules: dict[str, Any] = {}
    parts: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if not key.startswith(PREFIX) or not part:
            raise ValueError(f"{folder}: expected keys of LoRA weights, found {key!r}")
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
    return modules, parts


def _check_parts(name: str, module: Any, parts: Parts, config: LoraConfig, folder: Path) -> None:
    kind = kind_of(module)
    if kind is None:
        raise ValueError(f"{folder}: expected a layer that takes adapters at {name!r}, found {type(module).__name__}")
    shapes = kind.shapes(module, rank_of(config, name))
    optional = {"lora_B.bias": config.lora_bias, "lora_magnitude_vector": config.use_dora}
    wanted = {part for part in shapes if optional.get(part, True)}
    for part in sorted(wanted | parts.keys()):
        expected = shapes[part] if part in wanted else "none"
        found = list(parts[part].shape) if part in parts else "none"
        if found != expected:
            raise ValueError(f"{folder}: expected {part} of shape {expected} for {name!r}, found {found}")
        if not torch.isfinite(parts[part]).all():
            raise ValueError(f"{folder}: expected finite weights, found inf or nan in {part} of {name!r}")


def _warn_of_another_base(model: nn.Module, config: LoraConfig, folder: Path) -> None:
    """The shapes fit, so the name may just be another path to the same model: this is no error."""
    found, wanted = getattr(getattr(model, "config", None), "_name_or_path", None), config.base_model_name_or_path
    if found and wanted and Path(found).name != Path(wanted).name:
        logger.warning("%s: the adapter was made for %r, and is put on %r", folder, wanted, found)


def _write_folder(folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / f".{WEIGHTS_FILE}.tmp", folder / f".{CONFIG_FILE}.tmp"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(config.to_json(), encoding="utf-8")
        for temporary in (weights, settings):
            _sync(temporary)
        os.replace(weights, folder / WEIGHTS_FILE)
        os.replace(settings, folder / CONFIG_FILE)
        _sync(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: could not be written: {error}") from error
    finally:
        weights.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
