"""The settings of a training run: their names, types and defaults."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .located import Located, read_yaml


class Section(BaseModel):
    """Settings that belong together; an unknown one is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Columns(Section):
    """What the columns of the data are called, where their own names do not say."""

    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None


class Data(Section):
    """Where rows come from, and how they become sequences of tokens."""

    train: str = Field(description="a .jsonl, .json, .csv, .parquet or .txt file, or the id of a dataset on the hub")
    eval: str | None = Field(default=None, description="the same, to evaluate on")
    eval_share: float = Field(default=0.0, ge=0, lt=1, description="of the rows, held out where `eval` is not given")
    split: str = Field(default="train", description="of a dataset from the hub")
    columns: Columns = Columns()
    max_length: int | None = Field(default=None, ge=2, description="tokens; null: 1024, or the model's length if less")
    too_long: Literal["refuse", "cut", "drop"] = Field(default="refuse", description="what to do with longer rows")
    packing: bool = Field(default=False, description="join rows to sequences of max_length")
    chat_template: Path | None = Field(default=None, description="a Jinja file, where the tokenizer has no template")


class Lora(Section):
    """The adapter: fields of `fastlora.LoraConfig`, with `patch`'s names for the usual ones."""

    r: int = Field(default=16, ge=1, description="rank")
    targets: list[str] | str | None = Field(default="all-linear", description="as in `fastlora.patch`")
    alpha: float | None = Field(default=None, description="null: r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the low-rank part's input")
    quantize: Literal["int8"] | None = Field(default=None, description="how the targets' frozen weights are stored")
    compute: Literal["int8"] | None = Field(default=None, description="int8 quantises their inputs, too")
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | str = True


class Training(Section):
    """How long, how fast and how often."""

    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="in place of epochs")
    batch_size: int = Field(default=4, ge=1, description="sequences per device and step")
    accumulation: int = Field(default=1, ge=1, description="batches per optimizer step")
    learning_rate: float = Field(default=2e-4, gt=0)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradients; 0: any")
    optimizer: str = Field(default="adamw_torch", description="`optim` of transformers' TrainingArguments")
    checkpointing: Literal["none", "non-reentrant", "reentrant"] = Field(default="none", description="of activations")
    compile: bool = False
    seed: int = 0
    log_every: int = Field(default=10, ge=1)
    save_every: int | None = Field(default=None, ge=1, description="steps; null: every epoch")
    eval_every: int | None = Field(default=None, ge=1, description="steps; null: every epoch")
    keep: int | None = Field(default=2, ge=1, description="checkpoints; null: all")


class Settings(Section):
    """A training run."""

    model: str = Field(description="folder or hub id of a causal language model")
    data: Data
    out: Path = Field(description="folder for checkpoints, the adapter and the loss curve")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights; auto: bfloat16 on a GPU, float32 elsewhere"
    )
    resume: bool = Field(default=True, description="go on from the last whole checkpoint in `out`")
    lora: Lora = Lora()
    training: Training = Training()


def read_settings(file: Path, overrides: Iterable[str] = ()) -> Settings:
    """The settings in a YAML file, with arguments such as `training.epochs=3` in place of what it has.

    Raises:
        ValueError: a setting is unknown, missing or of the wrong kind; all of those are named, each with its line.
        OSError: the file cannot be read.
    """
    located = read_yaml(file, overrides)
    try:
        return Settings.model_validate(located.values)
    except ValidationError as error:
        order = list(located.places)
        found = sorted(error.errors(), key=lambda problem: order.index(_path_in(located.values, problem["loc"])))
        problems = [_in_words(problem, located) for problem in found]
    raise ValueError("\n".join(dict.fromkeys(problems)))


def list_settings(section: type[BaseModel] = Settings, indent: str = "") -> list[str]:
    """Every setting with its default or, where it has none, three dots; what it means; and those of its section."""
    lines = []
    for name, field in section.model_fields.items():
        default: Any = "..." if field.is_required() else field.default
        nested = field.annotation if isinstance(field.annotation, type) else None
        if nested is not None and issubclass(nested, BaseModel):
            lines += [f"{indent}{name}:", *list_settings(nested, f"{indent}  ")]
            continue
        about = "; ".join(filter(None, [" | ".join(_choices(field.annotation)), field.description]))
        text = default if default == "..." else json.dumps(default)
        lines.append(f"{indent}{name}: {text}" + (f"  # {about}" if about else ""))
    return lines


def _choices(kind: Any) -> list[str]:
    """The values that a type of `Literal`, alone or among others, allows."""
    literals = [one for one in (kind, *get_args(kind)) if get_origin(one) is Literal]
    return [json.dumps(choice) for literal in literals for choice in get_args(literal)]


def _in_words(problem: Any, located: Located) -> str:
    path = _path_in(located.values, problem["loc"])
    name, place = ".".join(map(str, path)), located.place(path)
    if problem["type"] == "extra_forbidden":
        known = _names_beside(path)
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.4)
        advice = f"did you mean {near[0]!r}?" if near else f"known here are {', '.join(known)}"
        return f"{place}: no setting is called {name!r}; {advice}"
    if problem["type"] == "missing":
        return f"{place}: expected the setting {'.'.join(map(str, problem['loc']))!r}, found none"
    return f"{place}: {name}: {problem['msg'][0].lower()}{problem['msg'][1:]}, found {problem['input']!r}"


def _path_in(values: Any, path: Iterable[Any]) -> tuple[Any, ...]:
    """The part of pydantic's path that leads to a value; behind it are names of alternative types."""
    found = []
    for part in path:
        if not (isinstance(values, dict) and part in values):
            break
        found.append(part)
        values = values[part]
    return tuple(found)


def _names_beside(path: tuple[Any, ...]) -> list[str]:
    """The names of the settings in the section that a path's last part is in."""
    section: type[BaseModel] = Settings
    for part in path[:-1]:
        annotation: Any = section.model_fields[part].annotation
        section = next(kind for kind in (annotation, *get_args(annotation)) if issubclass(kind, BaseModel))
    return list(section.model_fields)
