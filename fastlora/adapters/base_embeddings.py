"""The frozen embeddings that an adapter file may bring along.

PEFT writes the embeddings of the base model into a file when their size is not that of the model on disk, since nobody
else has the new rows, and whenever a layer named `embed_tokens` or `lm_head` is a target. It puts them into the model
when it loads the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PREFIX, LoraConfig
from ..layers import LinearLayer, LoraLayer, TokenLayer
from ..log import logger
from ..models.ends import input_embedding, output_embedding
from .registry import adapters

_ROWS_BEFORE = "fastlora_embeddings_before"
_INFIXES = (".token_adapter.base_layer", ".base_layer", "")  # where PEFT's wrappers have the module they wrap


def take_embeddings(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    """Takes the base model's embeddings out of the tensors of an adapter file.

    Returns:
        Tensors by the name of the parameter they are for; one that equals the model's own is left out.

    Raises:
        ValueError: they do not fit the model, or would change it under its other adapters.
    """
    found: dict[str, Tensor] = {}
    for name, own, parameter in _parameters(model):
        keys = [f"{PREFIX}{name}{infix}.{own}" for infix in _INFIXES]
        key = next((key for key in keys if key in tensors), None)
        trained = _is_to_save(config, name) or (own == "bias" and config.bias == "all")
        if key is None or trained or not parameter.is_floating_point():
            continue
        found[f"{name}.{own}"] = tensors.pop(key).to(parameter.device, parameter.dtype)
        _check(f"{name}.{own}", parameter, found[f"{name}.{own}"], folder)
    _check_shared(model, found, folder)
    found = {name: tensor for name, tensor in found.items() if not torch.equal(_parameter(model, name), tensor)}
    if found and adapters(model):
        raise ValueError(
            f"{folder}: expected the embeddings that the model has, found others for {sorted(found)}, "
            f"which its adapters {sorted(adapters(model))} were not made for"
        )
    return found


def replace_embeddings(model: nn.Module, found: dict[str, Tensor], folder: Path) -> None:
    """Puts embeddings into the model, and notes the rows that were there for `give_embeddings_back`."""
    for name, tensor in found.items():
        parameter = _parameter(model, name)
        rows = (parameter != tensor).flatten(1).any(dim=1) if tensor.dim() > 1 else parameter != tensor
        before = parameter.detach()[rows].clone()
        model.__dict__.setdefault(_ROWS_BEFORE, {})[name] = rows, before
        parameter.detach()[rows] = tensor[rows]
        logger.warning("%s: replaced %d rows of %s by those that the adapter was trained on", folder, len(before), name)


def give_embeddings_back(model: nn.Module) -> None:
    """Undoes `replace_embeddings`."""
    for name, (rows, before) in model.__dict__.pop(_ROWS_BEFORE, {}).items():
        _parameter(model, name).detach()[rows] = before.to(_parameter(model, name).device)


def keep_embeddings(model: nn.Module) -> None:
    """Forgets the rows that `give_embeddings_back` would put back."""
    model.__dict__.pop(_ROWS_BEFORE, None)


def resized_embeddings(model: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The model's embeddings under PEFT's names, where the base model on this machine has another vocabulary size."""
    settings: Any = getattr(model, "config", None)
    base, size = config.base_model_name_or_path, getattr(settings, "vocab_size", None)
    if not base or size is None or _size_on_disk(settings, base) in (None, size):
        return {}
    return {
        f"{PREFIX}{name}{_infix(model.get_submodule(name))}.{own}": _frozen(model.get_submodule(name), own).clone()
        for name, own, _ in _parameters(model)
    }


def _size_on_disk(settings: Any, base: str) -> int | None:
    """The vocabulary size of a base model's config, None where this machine does not have it."""
    try:
        return type(settings).from_pretrained(base, local_files_only=True).vocab_size
    except OSError:
        return None


def _parameters(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Module name, own name and parameter of the model's input embedding and output head."""
    ends = input_embedding(model), output_embedding(model)
    modules = [(name, module) for name, module in model.named_modules() if any(module is end for end in ends)]
    named = [(name, own, module._parameters.get(own)) for name, module in modules for own in ("weight", "bias")]
    return [(name, own, parameter) for name, own, parameter in named if parameter is not None]


def _frozen(module: Any, own: str) -> Tensor:
    """A parameter of a module as it was before its adapters and its quantisation."""
    if isinstance(module, LinearLayer) and own == "weight" and module.weight_scale is not None:
        return module.dense_weight()
    if isinstance(module, LoraLayer) and module.adapters_enabled:
        return module.before_merge(own).detach()
    return module._parameters[own].detach()  # type: ignore[union-attr]


def _infix(module: nn.Module) -> str:
    if isinstance(module, TokenLayer):
        return ".token_adapter.base_layer"
    return ".base_layer" if isinstance(module, LoraLayer) else ""


def _is_to_save(config: LoraConfig, name: str) -> bool:
    """Whether the tensors of a module belong to its trained copy."""
    return any(name == part or name.endswith(f".{part}") for part in config.modules_to_save or [])


def _check(name: str, parameter: Tensor, tensor: Tensor, folder: Path) -> None:
    if tensor.shape != parameter.shape:
        raise ValueError(
            f"{folder}: expected {name} of shape {list(parameter.shape)}, found {list(tensor.shape)}; resize the "
            f"model first: model.resize_token_embeddings({tensor.shape[0]})"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{folder}: expected finite weights, found inf or nan in {name}")


def _check_shared(model: nn.Module, found: dict[str, Tensor], folder: Path) -> None:
    """Raises ValueError where the file has two values for one parameter of the model."""
    by_parameter: dict[int, str] = {}
    for name, tensor in found.items():
        first = by_parameter.setdefault(id(_parameter(model, name)), name)
        if not torch.equal(tensor, found[first]):
            raise ValueError(f"{folder}: expected one value for {first} and {name}, which are tied, found two")


def _parameter(model: nn.Module, name: str) -> Any:
    module, _, own = name.rpartition(".")
    return model.get_submodule(module)._parameters[own]
