"""The initial adapters of a model, by any method, after every check."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..adapters.registry import adapters
from ..config import LoraConfig
from ..init_settings import PISSA
from ..layers import LinearLayer, kind_of
from .calibration import generators_kept_on_error
from .corda import corda, covariances
from .decompose import loftq, olora, pissa
from .eva import eva
from .lora_ga import gradients, lora_ga
from .orthogonal import orthogonal
from .target import Initial, Target, features, make_targets

PLAIN_INITS = (True, False, "gaussian")  # what a layer draws by itself
DATA_DRIVEN = ("eva", "corda", "lora_ga")


def initial_adapters(
    model: nn.Module, modules: dict[str, Any], config: LoraConfig, calibration: Any = None
) -> dict[str, Initial]:
    """The adapters that `config.init_lora_weights` starts the modules with, by name; the model is not changed.

    Args:
        model: the model that the modules are in; run on the calibration batches.
        modules: the targets by name. A module that EVA gives the rank 0 is not in the result.
        calibration: batches of keyword arguments of the model, for "eva", "corda" and "lora_ga" and only for them;
            with labels for "lora_ga", so that the output has a loss.

    Raises:
        ValueError, TypeError: a weight, a rank or the calibration does not fit the method; torch's generators are
            then as they were, too.
    """
    for name, module in modules.items():
        kind = kind_of(module)
        if kind is None or not issubclass(kind, LinearLayer):
            raise ValueError(
                f"init_lora_weights: expected linear layers for {config.init_lora_weights!r}, found "
                f"{type(module).__name__} at {name!r}"
            )
    method, targets = config.init_lora_weights, make_targets(modules, config)
    _check_calibration(method, calibration)
    _check_targets(model, method, targets)
    with generators_kept_on_error(model):
        if method in DATA_DRIVEN:
            return _from_data(model, targets, config, calibration)
        return {target.name: _from_weight(target, config) for target in targets}


def changes_weight(method: bool | str) -> bool:
    """Whether a method changes the frozen weight."""
    return method in ("olora", "loftq", "corda", "lora_ga") or _is_pissa(method)


def _is_pissa(method: bool | str) -> bool:
    return isinstance(method, str) and PISSA.fullmatch(method) is not None


def _from_weight(target: Target, config: LoraConfig) -> Initial:
    method = config.init_lora_weights
    if method == "orthogonal":
        return orthogonal(target)
    if method == "olora":
        return olora(target)
    if method == "loftq":
        return loftq(target, config.loftq_config["loftq_bits"], config.loftq_config["loftq_iter"])
    if isinstance(method, str) and (match := PISSA.fullmatch(method)):
        return pissa(target, None if match[1] is None else int(match[1]))
    raise ValueError(f"init_lora_weights: expected a method of fastlora.inits, found {method!r}")


def _from_data(
    model: nn.Module, targets: list[Target], config: LoraConfig, calibration: Iterable
) -> dict[str, Initial]:
    if config.eva_config is not None and config.init_lora_weights == "eva":
        return eva(model, targets, config.eva_config, calibration)
    if config.corda_config is not None and config.init_lora_weights == "corda":
        found = covariances(model, targets, config.corda_config, calibration)
        return {target.name: corda(target, config.corda_config, found[target.name]) for target in targets}
    assert config.lora_ga_config is not None
    found = gradients(model, targets, calibration)
    return {target.name: lora_ga(target, config.lora_ga_config, found[target.name]) for target in targets}


def _check_calibration(method: bool | str, calibration: Any) -> None:
    if method in DATA_DRIVEN and calibration is None:
        raise ValueError(f"calibration: expected batches for init_lora_weights={method!r}, found None")
    if method not in DATA_DRIVEN:
        check_no_calibration(method, calibration)
    if calibration is not None and not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: expected an iterable of batches, found {type(calibration).__name__}")


def check_no_calibration(method: bool | str, calibration: Any) -> None:
    """Raises ValueError where batches are given to a method that looks at no data."""
    if calibration is not None:
        raise ValueError(f"calibration: expected with init_lora_weights among {DATA_DRIVEN}, found with {method!r}")


def _check_targets(model: nn.Module, method: bool | str, targets: list[Target]) -> None:
    if changes_weight(method):
        if adapters(model):
            raise ValueError(
                f"init_lora_weights: {method!r} changes the frozen weights, expected a model without adapters, found "
                f"{sorted(adapters(model))}"
            )
        for target in targets:
            _check_weight(target, method)
    if method == "eva" and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("init_lora_weights: 'eva' expected a model in memory, found weights on the meta device")
    if method == "orthogonal":
        for target in targets:
            if target.rank % 2:
                raise ValueError(f"r: expected an even rank for 'orthogonal', found {target.rank} at {target.name!r}")


def _check_weight(target: Target, method: bool | str) -> None:
    """Whether the weight of a target can be decomposed."""
    name, weight, wanted = target.name, target.module.weight, target.rank
    if weight.is_meta:
        raise ValueError(f"init_lora_weights: {method!r} expected weights in memory, found {name!r} on the meta device")
    if target.is_int8 and method != "olora":
        raise ValueError(
            f"init_lora_weights: {method!r} expected a dense weight, found int8 at {name!r}; patch the dense model "
            "with quantize='int8' instead, which rounds what the adapter leaves of the weight"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"init_lora_weights: {method!r} expected finite weights, found inf or nan in {name}.weight")
    most = min(features(target.module)) // (2 if method == "lora_ga" else 1)
    if wanted > most:
        raise ValueError(f"r: expected a rank of at most {most} for {method!r} at {name!r}, found {wanted}")
