"""Which modules of a model an adapter goes to: PEFT's matching rules, and errors that name what exists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from ..adapters.trained import is_saved
from ..config import LoraConfig
from ..layers import ADAPTABLE, LinearLayer, LoraParameter, kind_of
from .architectures import DEFAULT_TARGETS
from .parameters import find_parameters

ALL_LINEAR = "all-linear"
LORA_PARTS = (nn.ParameterDict, LoraParameter)  # what adapters add to the module tree


def find_targets(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, dict[str, Any]]:
    """The config with its targets made explicit, and the modules they select by name.

    Raises:
        ValueError: nothing is selected, or there is no default for the architecture.
        TypeError: a selected module is of a kind that cannot carry an adapter.
    """
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, LORA_PARTS)}
    parameters = find_parameters(model, config)
    config = replace(config, target_modules=_explicit_targets(model, modules, config))
    selected = {name: module for name, module in modules.items() if name and matches(config, name)}
    adaptable = {name: module for name, module in selected.items() if kind_of(module) is not None}
    if not selected and (config.target_modules or not parameters):
        raise ValueError(_nothing_found(config, modules))
    for name in selected.keys() & {path.rpartition(".")[0] for path in parameters}:
        raise ValueError(f"target_parameters: expected none of a module that is a target itself, found one of {name!r}")
    for name, module in selected.items():
        if name not in adaptable:
            raise TypeError(
                f"targets: expected {ADAPTABLE}, found {type(module).__name__} at {name!r}; "
                "leave it out with exclude_modules"
            )
    return config, adaptable | parameters


def check_settings(modules: dict[str, Any], config: LoraConfig) -> None:
    """Raises ValueError where a target cannot have an adapter of the config's settings."""
    for name, module in modules.items():
        kind = kind_of(module)
        assert kind is not None, "find_targets lets no other module through"
        kind.check(module, name, rank_of(config, name), config.lora_dropout, config.use_dora, config.lora_bias)


def matches(config: LoraConfig, name: str) -> bool:
    """Whether a module of this name gets an adapter; `config.target_modules` is a list or a regular expression."""
    targets, excluded = config.target_modules, config.exclude_modules
    if is_saved(config, name):
        return False
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _has_suffix(name, excluded)):
        return False
    if targets is None:
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return name in targets or (_has_suffix(name, targets) and _in_chosen_layer(config, name))


def output_head(model: nn.Module) -> str | None:
    """The name of the layer that produces the logits, where the model says which one it is."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None:
        return None
    return next((name for name, module in model.named_modules() if module is head), None)


def pattern_value(patterns: dict, name: str, default):
    """The value of the first pattern that matches the end of a module's name, else the default."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank of an adapter at a module."""
    return pattern_value(config.rank_pattern, name, config.r)


def scaling_of(config: LoraConfig, name: str) -> float:
    """The factor of an adapter's low-rank part at a module."""
    return config.scaling(rank_of(config, name), pattern_value(config.alpha_pattern, name, config.lora_alpha))


def _explicit_targets(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> list[str] | str | None:
    targets = config.target_modules
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in DEFAULT_TARGETS and config.target_parameters:
            return None
        if model_type not in DEFAULT_TARGETS:
            raise ValueError(
                f"targets: expected to be given, since there is no default for model_type {model_type!r}; "
                f"for instance {ALL_LINEAR!r}"
            )
        default = DEFAULT_TARGETS[model_type]
        return default if isinstance(default, str) else list(default)
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        head = output_head(model)
        return shortest_targets([n for n, m in modules.items() if _is_linear(m) and n != head], modules)
    return targets


def _is_linear(module: nn.Module) -> bool:
    kind = kind_of(module)
    return kind is not None and issubclass(kind, LinearLayer)


def shortest_targets(names: list[str], modules: Iterable[str]) -> list[str]:
    """The last components of `names` where they select just these modules, else the whole names."""
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names})
    return suffixes if {name for name in modules if _has_suffix(name, suffixes)} == set(names) else sorted(names)


def _has_suffix(name: str, suffixes: Iterable[str]) -> bool:
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _in_chosen_layer(config: LoraConfig, name: str) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(match.group(1)) in ([layers] if isinstance(layers, int) else layers)
    return False


def _nothing_found(config: LoraConfig, modules: dict[str, nn.Module]) -> str:
    existing = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if kind_of(module) is not None})
    if not isinstance(config.target_modules, str) and any(_has_suffix(n, config.target_modules or []) for n in modules):
        return (
            f"targets: expected some of {config.target_modules!r} to be left, found that exclude_modules "
            f"{config.exclude_modules!r} or layers_to_transform {config.layers_to_transform!r} leaves out all"
        )
    wanted = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    near = [
        hit for target in wanted for hit in difflib.get_close_matches(target.rsplit(".", 1)[-1], existing, cutoff=0.5)
    ]
    names = ", ".join(dict.fromkeys(near)) if near else ", ".join(existing)
    return f"targets: expected names of adaptable layers, found none for {config.target_modules!r}; nearest: {names}"
