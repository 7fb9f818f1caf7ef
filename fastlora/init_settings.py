"""The ways to initialise an adapter, and their settings with the names, defaults and ranges of PEFT's configs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

INITS = (
    True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq", "eva", "corda", "lora_ga"
)  # fmt: skip
PISSA = re.compile(r"pissa(?:_niter_(\d+))?")


@dataclass(frozen=True)
class Setting:
    """One key of a nested config: its default, which values it takes, and how to say so."""

    default: Any
    accepts: Callable[[Any], bool]
    expected: str


def _one_of(default: Any, *values: Any) -> Setting:
    return Setting(default, lambda value: value in values, f"one of {values}")


def _number(default: float, at_least: float, at_most: float = float("inf")) -> Setting:
    bounds = f"at least {at_least}" if at_most == float("inf") else f"from {at_least} to {at_most}"
    return Setting(default, lambda v: _is_number(v) and at_least <= v <= at_most, f"a number {bounds}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(default: int, at_least: float = float("-inf")) -> Setting:
    bounds = "" if at_least == float("-inf") else f" of at least {at_least}"
    return Setting(
        default, lambda v: isinstance(v, int) and _is_number(v) and v >= at_least, f"a whole number{bounds}"
    )  # fmt: skip


def _flag(default: bool) -> Setting:
    return Setting(default, lambda value: isinstance(value, bool), "True or False")


_NO_FILE = Setting(None, lambda value: value is None, "None, since PEFT's cache files are pickles, which are not read")

# The name of each method's config, and its keys.
SETTINGS: dict[str, tuple[str, dict[str, Setting]]] = {
    "loftq": ("loftq_config", {"loftq_bits": _one_of(4, 4, 8), "loftq_iter": _whole(1, 1)}),
    "eva": (
        "eva_config",
        {
            "rho": _number(2.0, 1.0),
            "tau": _number(0.99, 0.0, 1.0),
            "use_label_mask": _flag(True),
            "label_mask_value": _whole(-100),
            "whiten": _flag(False),
            "adjust_scaling_factors": _flag(True),
        },
    ),
    "corda": (
        "corda_config",
        {
            "cache_file": _NO_FILE,
            "covariance_file": _NO_FILE,
            "corda_method": _one_of("ipm", "ipm", "kpm"),
            "verbose": _flag(False),  # this and the last are about PEFT's own preprocessing
            "use_float16_for_covariance": _flag(False),
            "prune_temporary_fields": _flag(True),
        },
    ),
    "lora_ga": (
        "lora_ga_config",
        {
            "direction": _one_of("ArB2r", "ArBr", "A2rBr", "ArB2r", "random"),
            "scale": _one_of("stable", "stable", "weight_svd", "gd_scale", "unit"),
            "stable_gamma": Setting(16, lambda value: _is_number(value) and value > 0, "a number above 0"),
        },
    ),
}


def check_init(method: Any) -> None:
    """Raises ValueError for a way to initialise that does not exist."""
    known = method in INITS if isinstance(method, bool) else isinstance(method, str) and _is_named(method)
    if not known:
        raise ValueError(f"init_lora_weights: expected one of {INITS}, found {method!r}")


def _is_named(method: str) -> bool:
    return PISSA.fullmatch(method) is not None or (method in INITS and method != "pissa_niter_N")


def completed(method: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a method with the defaults for what `values` leaves out.

    Raises:
        ValueError: a key or a value does not exist.
    """
    name, known = SETTINGS[method]
    check_keys(method, values)
    full = {key: setting.default for key, setting in known.items()} | dict(values or {})
    for key, value in full.items():
        if not known[key].accepts(value):
            raise ValueError(f"{name}[{key!r}]: expected {known[key].expected}, found {value!r}")
    return full


def check_keys(method: str, values: Any) -> None:
    """Raises TypeError where the settings of a method are no dictionary, ValueError where one has an unknown key."""
    name, known = SETTINGS[method]
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a dictionary, found {type(values).__name__}")
    for key in values or {}:
        if key not in known:
            raise ValueError(f"{name}: expected keys among {sorted(known)}, found {key!r}")
