"""Trainable tokens of a model: which layers `trainable_token_indices` means, and putting their rows on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PREFIX, LoraConfig
from ..layers import adopt_tokens, token_kind
from ..layers.base import Parts
from ..layers.tokens import ROWS
from ..models.ends import input_embedding

_FIELD = "trainable_token_indices"


def find_tokens(model: nn.Module, config: LoraConfig, targets: Iterable[str] = ()) -> dict[str, list[int]]:
    """The layers that own trainable tokens by name, with their tokens.

    A list means the model's input embedding. Of layers that share one weight only that embedding, or else the first of
    them, owns rows; the others follow it, as in PEFT.

    Args:
        targets: names of the modules that get LoRA matrices from the same config.

    Raises:
        ValueError: a name or a token does not exist, or a layer cannot have trainable tokens as well.
    """
    indices = config.trainable_token_indices
    if indices is None:
        return {}
    modules: dict[str, Any] = dict(model.named_modules())
    first = input_embedding(model)
    embedding = next((name for name, module in modules.items() if module is first), None)
    wanted = _by_module(modules, indices, embedding)
    owners = {name: _owner(modules, name, embedding) for name in wanted}
    for name, tokens in wanted.items():
        for module in (name, *sharing(modules, name)):
            _check(module, modules[module], tokens, targets)
        owner = owners[name]
        if owner not in wanted:
            raise ValueError(f"{_FIELD}: expected {owner!r}, found {name!r}, which shares its weight")
        if wanted[owner] != tokens:
            raise ValueError(
                f"{_FIELD}: expected the same tokens for {owner!r} and {name!r}, which share a weight, "
                f"found {wanted[owner]} and {tokens}"
            )
    return {name: tokens for name, tokens in wanted.items() if owners[name] == name}


def initial_rows(model: nn.Module, tokens: Mapping[str, Sequence[int]]) -> dict[str, Parts]:
    """The rows of new adapters: those of the frozen weights."""
    return {name: {ROWS: _weight(model.get_submodule(name)).detach()[list(ids)]} for name, ids in tokens.items()}


def attach_tokens(
    model: nn.Module, config: LoraConfig, weights: Mapping[str, Parts], adapter: str, trainable: bool
) -> None:
    """Gives checked layers an adapter with trainable tokens, and ties the layers that share their weights to them."""
    modules = dict(model.named_modules())
    for name, ids in find_tokens(model, config).items():
        layer = adopt_tokens(modules[name])
        layer.add_rows(adapter, ids, weights[name][ROWS], trainable)
        for other in sharing(modules, name):
            follower = adopt_tokens(modules[other])
            if not follower.follows:
                follower.follow(layer)


def take_tokens(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], folder: Path) -> dict[str, Parts]:
    """Takes the trained rows out of the tensors of an adapter file.

    Raises:
        ValueError: they do not fit the model and the config.
    """
    keys = {key.removeprefix(PREFIX).removesuffix(f".{ROWS}"): key for key in tensors if key.endswith(f".{ROWS}")}
    found = {name: tensors.pop(key) for name, key in keys.items()}
    modules: dict[str, Any] = dict(model.named_modules())
    tokens = find_tokens(model, config, {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors})
    for name, ids in tokens.items():
        expected = [len(ids), _weight(modules[name]).shape[1]]
        shape = list(found[name].shape) if name in found else "none"
        if shape != expected:
            raise ValueError(f"{folder}: expected {ROWS} of shape {expected} for {name!r}, found {shape}")
        if not torch.isfinite(found[name]).all():
            raise ValueError(f"{folder}: expected finite weights, found inf or nan in {ROWS} of {name!r}")
    followers = {other for name in tokens for other in sharing(modules, name)}  # PEFT may save their rows once more
    for name in found.keys() - tokens.keys() - followers:
        raise ValueError(f"{folder}: expected no trainable tokens for {name!r} by {_FIELD}, found some")
    return {name: {ROWS: found[name]} for name in tokens}


def sharing(modules: Mapping[str, Any], name: str) -> list[str]:
    """The other modules that have the weight of the module of this name."""
    weight = _weight(modules[name])
    return [other for other, module in modules.items() if other != name and _weight(module) is weight]


def _weight(module: Any) -> Any:
    """The parameter itself, which the attribute of a layer with trainable tokens is not."""
    return module._parameters.get("weight")


def _by_module(
    modules: Mapping[str, Any], indices: list[int] | dict[str, list[int]], embedding: str | None
) -> dict[str, list[int]]:
    """The tokens by whole module names."""
    if not isinstance(indices, dict):
        if embedding is None:
            raise ValueError(f"{_FIELD}: expected a dict by module name for a model without input embeddings")
        return {embedding: list(indices)}
    found: dict[str, list[int]] = {}
    for key, tokens in indices.items():
        names = [name for name in modules if name == key or name.endswith(f".{key}")]
        if not names:
            raise ValueError(f"{_FIELD}: expected names of embeddings, found {key!r}, which no module ends in")
        found |= {name: list(tokens) for name in names}
    return {name: found[name] for name in modules if name in found}  # a config's file has its keys in another order


def _check(name: str, module: Any, tokens: list[int], targets: Iterable[str]) -> None:
    """Raises ValueError where a module cannot have these trainable tokens."""
    kind = token_kind(module)
    if kind is None or name in targets:
        found = "LoRA matrices" if name in targets else type(module).__name__
        raise ValueError(f"{_FIELD}: expected an nn.Embedding or nn.Linear without LoRA, found {found} at {name!r}")
    kind.check_module(module, name)
    rows = _weight(module).shape[0]
    outside = [token for token in tokens if not 0 <= token < rows]
    if outside:
        raise ValueError(f"{_FIELD}: expected tokens from 0 to {rows - 1} for {name!r}, found {outside[0]}")


def _owner(modules: Mapping[str, Any], name: str, embedding: str | None) -> str:
    """Which of the modules with one weight owns its rows: the model's input embedding, else the first."""
    group = {name, *sharing(modules, name)}
    return embedding if embedding in group else next(other for other in modules if other in group)
