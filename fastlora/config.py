"""`LoraConfig`: the settings of one adapter, with PEFT's field names, defaults and JSON."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from .init_settings import SETTINGS, check_init, check_keys, completed
from .log import logger

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # of every name in PEFT's files of weights
PEFT_FORMAT = "0.21.2"  # the PEFT release whose file format is written
BIASES = ("none", "all", "lora_only")


@dataclass
class LoraConfig:
    """The settings of one LoRA adapter. Fields and defaults are those of `peft.LoraConfig`.

    Args:
        r: rank.
        target_modules: which modules get an adapter: a list of names or dotted suffixes, one regular expression
            for whole names, `"all-linear"`, or None for the architecture's default.
        exclude_modules: names, suffixes or a regular expression to leave out.
        lora_alpha: the low-rank part is scaled by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout: probability to drop an element of the low-rank part's input, in [0, 1).
        init_lora_weights: True (A Kaiming uniform, B zero), False (both random), or the name of a method of
            `fastlora.inits`: "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq", "eva", "corda" or
            "lora_ga".
        loftq_config, eva_config, corda_config, lora_ga_config: the settings of the method of that name, as
            dictionaries; what they leave out gets PEFT's default.
        rank_pattern, alpha_pattern: overrides of r and lora_alpha by regular expression on the end of the name.
        layers_to_transform, layers_pattern: restrict the targets to layers of these indices.

        target_parameters: which parameters get an adapter besides, where a module itself multiplies by them: a list
            of dotted suffixes.
        trainable_token_indices: tokens whose rows of the input embedding train, or tokens by the name of a layer.

    Raises:
        ValueError: a value is out of range, or a field is set that fastlora does not support.
    """

    r: int = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str = "megatron.core"
    trainable_token_indices: list[int] | dict | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: dict | None = None
    corda_config: dict | None = None
    lora_ga_config: dict | None = None
    use_dora: bool = False
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict | None = None
    layer_replication: list | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
    ensure_weight_tying: bool = False
    task_type: str | None = None
    peft_type: str = "LORA"
    auto_mapping: dict | None = None
    peft_version: str = PEFT_FORMAT
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value))
            elif value is not None and not isinstance(value, (str, list)):
                raise TypeError(f"{name}: expected a list of names, a regular expression or None, found {value!r}")
        self._check_layers()
        _check_rank("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout: expected 0 <= dropout < 1, found {self.lora_dropout}")
        if self.target_parameters is not None:
            self.target_parameters = _names("target_parameters", self.target_parameters)
        self._check_init()
        _check_tokens(self.trainable_token_indices)
        if self.bias not in BIASES:
            raise ValueError(f"bias: expected one of {BIASES}, found {self.bias!r}")
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias: expected without use_dora, as in PEFT, found both")
        if self.peft_type != "LORA":
            raise ValueError(f"peft_type: expected 'LORA', found {self.peft_type!r}")
        self._refuse_unsupported()

    def _check_init(self) -> None:
        check_init(self.init_lora_weights)
        for method, (name, _) in SETTINGS.items():
            values = getattr(self, name)
            if method == self.init_lora_weights:
                setattr(self, name, completed(method, values))
            elif values:
                check_keys(method, values)
                _warn_of_idle_settings(name, method)
        if self.use_dora and not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise ValueError(f"use_dora: expected a plain init_lora_weights, found {self.init_lora_weights!r}")

    def _refuse_unsupported(self) -> None:
        for known in fields(self):
            value = getattr(self, known.name)
            if known.name not in SUPPORTED and value and value != known.default:
                raise ValueError(f"{known.name}: not supported by fastlora, found {value!r}")

    def _check_layers(self) -> None:
        targets = self.target_modules
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("layers_pattern: expected together with layers_to_transform, found alone")
        if self.layers_to_transform is not None and isinstance(targets, str) and targets.lower() != "all-linear":
            raise ValueError(f"layers_to_transform: expected with a list of targets, found with the regex {targets!r}")

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor of `B A` (LoRA, section 4.1; rsLoRA, Kalajdzievski 2023, eq. 4)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        """The text of PEFT's adapter_config.json."""
        return json.dumps(self.to_dict() | {"inference_mode": True}, indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        """Reads PEFT's dictionary. A key that no field has is refused unless it switches nothing on."""
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name not in known and value:
                raise ValueError(f"{name}: a setting that fastlora does not know, found {value!r}")
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_peft(cls, config: Any) -> LoraConfig:
        """Reads a `peft.LoraConfig`."""
        values = {name: getattr(value, "value", value) for name, value in config.to_dict().items()}
        values.pop("runtime_config", None)  # how PEFT runs, not what the adapter is; never in the JSON
        return cls.from_dict(values)

    @classmethod
    def from_folder(cls, path: str | PathLike[str]) -> LoraConfig:
        """Reads adapter_config.json from an adapter folder."""
        file = Path(path, CONFIG_FILE)
        if not file.is_file():
            raise ValueError(f"path: expected a folder with {CONFIG_FILE}, found none in {str(path)!r}")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file}: expected JSON, found {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
        return cls.from_dict(values)


SUPPORTED = {
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "task_type",
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "qalora_group_size", "use_dora", "lora_bias", "target_parameters",
    "layer_replication",    "trainable_token_indices", "bias", "modules_to_save",
    *(name for name, _ in SETTINGS.values()),
    "ensure_weight_tying",
}  # fmt: skip


@functools.cache
def _warn_of_idle_settings(name: str, method: str) -> None:
    logger.warning("%s: has no effect without init_lora_weights=%r", name, method)


def _check_rank(name: str, rank: Any) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, found {rank!r}")


def _names(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{name}: expected a list of names or None, found {value!r}")
    return sorted(value) if isinstance(value, set) else list(value)


def _check_tokens(indices: Any) -> None:
    for tokens in indices.values() if isinstance(indices, dict) else [indices]:
        if indices is None:
            return
        whole = isinstance(tokens, list) and all(isinstance(t, int) and not isinstance(t, bool) for t in tokens)
        if not whole or not tokens or len(set(tokens)) < len(tokens):
            raise ValueError(
                f"trainable_token_indices: expected lists of different whole numbers, at least one, found {indices!r}"
            )
