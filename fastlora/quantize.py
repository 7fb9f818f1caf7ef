"""Int8 frozen weights, and taking over models that bitsandbytes quantised."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layers import LinearLayer, adopt, is_linear4bit, is_linear8bit, kind_of

QUANTIZATIONS = (None, "int8")

_TRANSFORMERS_MARKS = (
    "is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit", "hf_quantizer", "quantization_method",
)  # fmt: skip
_MARKS_BEFORE = "fastlora_quantized_before"


def check_quantizable(model: nn.Module, targets: dict[str, Any], quantize: str | None) -> None:
    """Raises ValueError for an unknown scheme, or where a target's weight is not finite or not its own."""
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize: expected one of {QUANTIZATIONS}, found {quantize!r}")
    if quantize is None:
        return
    names = _names_by_weight(model)
    for name, module in targets.items():
        kind = kind_of(module)
        if kind is None or not issubclass(kind, LinearLayer):
            continue  # only linear layers are quantised
        if is_linear4bit(module):
            raise ValueError(f"quantize: expected None for layers in 4 bits already, found {quantize!r} with {name!r}")
        if not module.weight.is_floating_point():
            continue
        if isinstance(module, LinearLayer) and module.weight_scale is not None:
            continue
        sharing = [other for other in names[id(module.weight)] if other != name]
        if sharing:
            raise ValueError(f"quantize: expected a weight of its own at {name!r}, found it shared with {sharing[0]!r}")
        if not module.weight.is_meta and not torch.isfinite(module.weight).all():
            raise ValueError(f"quantize: expected finite weights, found inf or nan in {name}.weight")


def _names_by_weight(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            names.setdefault(id(weight), []).append(name)
    return names


def take_over_bitsandbytes(model: nn.Module) -> None:
    """Turns every 8-bit module of bitsandbytes into an int8 layer of fastlora, with the same codes and scales.

    The 4-bit ones stay what they are. The model then no longer counts as quantised for transformers, whose Trainer
    refuses one that is not a PeftModel.
    """
    modules = [module for module in model.modules() if is_linear8bit(module)]
    for module in modules:
        layer = adopt(module)
        if isinstance(layer, LinearLayer) and layer.weight_scale is None:
            layer.quantize()
    if _MARKS_BEFORE in model.__dict__ or not (modules or any(is_linear4bit(module) for module in model.modules())):
        return
    marks = {name: model.__dict__.pop(name) for name in _TRANSFORMERS_MARKS if name in model.__dict__}
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "quantization_config"):
        marks["quantization_config"] = config.quantization_config
        del config.quantization_config
    model.__dict__[_MARKS_BEFORE] = marks


def give_back_to_bitsandbytes(model: nn.Module) -> None:
    """Undoes what `take_over_bitsandbytes` did to the model itself."""
    marks = model.__dict__.pop(_MARKS_BEFORE, {})
    config: Any = getattr(model, "config", None)
    if "quantization_config" in marks:
        config.quantization_config = marks.pop("quantization_config")
    model.__dict__.update(marks)
