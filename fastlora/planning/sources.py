"""From what a user has of a model (a config, a folder, the model itself) to the same model on the meta device."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import CONFIG_FILE, LoraConfig
from ..layers import LoraLayer, is_linear8bit

SETTINGS_FILE = "config.json"


@dataclass(frozen=True)
class Source:
    """What was found.

    Attributes:
        model: on the meta device.
        adapter: the config of the adapter, where the source is one.
        quantized_by: the method by which the files are quantised, where they are; the model is dense.
    """

    model: Any
    adapter: LoraConfig | None = None
    quantized_by: str | None = None


def find_model(source: Any, dtype: torch.dtype | None) -> Source:
    """A model like the source on the meta device.

    Args:
        source: a model; a transformers config; its config.json; the folder of a model or of an adapter, whose base
            is looked for where its config says; or the hub id of a model in the local cache. Nothing is downloaded.
        dtype: of the weights; None for the dtype that the source names.

    Raises:
        ValueError: there is no config at the source, or transformers cannot make a model of it.
        TypeError: the source is nothing of this.
    """
    if isinstance(source, nn.Module):
        if any(type(module).__module__.startswith("peft.") for module in source.modules()):
            raise ValueError("model: expected a model without PEFT's layers, found some; plan its adapter's folder")
        if any(is_linear8bit(module) and not isinstance(module, LoraLayer) for module in source.modules()):
            raise ValueError("model: expected one in 8 bits to be patched, found Linear8bitLt; patch it, then plan it")
        return Source(_without_data(source, dtype))
    adapter = None
    if isinstance(source, (str, PathLike)):
        if Path(source, CONFIG_FILE).is_file():
            adapter = LoraConfig.from_folder(source)
            source = _base_of(adapter, Path(source))
        source = _read_config(source)
    if not hasattr(source, "to_dict") or not hasattr(source, "model_type"):
        raise TypeError(f"model: expected a model, a config, a folder or a config.json, found {type(source).__name__}")
    config = copy.deepcopy(source)
    quantization = config.__dict__.pop("quantization_config", None)
    return Source(_build(config, dtype), adapter, None if quantization is None else _method(quantization))


def _method(quantization: Any) -> str:
    """The method of a transformers quantisation config, which may be a dictionary."""
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = values.get("quant_method", "an unnamed method")
    return str(getattr(method, "value", method))


def _base_of(adapter: LoraConfig, folder: Path) -> str | Path:
    base = adapter.base_model_name_or_path
    if not base:
        raise ValueError(f"model: expected {CONFIG_FILE} with base_model_name_or_path, found none in {str(folder)!r}")
    return base


def _read_config(source: str | PathLike[str]) -> Any:
    from transformers import AutoConfig

    path = Path(source)
    if path.is_dir():
        path = path / SETTINGS_FILE
        if not path.is_file():
            raise ValueError(f"model: expected {SETTINGS_FILE} or {CONFIG_FILE} in the folder, found none in {source}")
    if path.is_file():
        return AutoConfig.for_model(**_read_json(path))
    try:
        return AutoConfig.from_pretrained(str(source), local_files_only=True)
    except OSError:
        raise ValueError(
            f"model: expected a folder, a config.json or a model in the local cache, found {str(source)!r}; a plan "
            "downloads nothing, and the model's config.json alone is enough"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, found {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{file}: expected the config of a transformers model, found no model_type")
    return values


def _build(config: Any, dtype: torch.dtype | None) -> nn.Module:
    import transformers

    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    make: Any = getattr(transformers, names[0])._from_config if names else transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return make(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)


def _without_data(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model whose tensors have no data; the model stays as it is."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
    found = copy.deepcopy(model, memo)
    return found if dtype is None else found.to(dtype)
