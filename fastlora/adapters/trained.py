"""Parameters of the model's own that train with an adapter: whole modules (`modules_to_save`) or biases (`bias`).

Every adapter has copies of its own. While it is active they stand in the places of the originals, so that whatever
reads a parameter reads the copy, and switching an adapter off brings the very originals back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..config import LoraConfig
from ..log import logger
from ..models.distributed import check_whole

_COPIES = "fastlora_copies"  # on the model: the copies by adapter and parameter name
_ORIGINALS = "fastlora_originals"  # on the model: the parameters whose places copies stand in, by name
_IN_PLACE = "fastlora_in_place"  # on the model: the adapters whose copies stand there

# The heads that PEFT adds to `modules_to_save` for a task, where the model has them.
TASK_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def saved_modules(config: LoraConfig) -> list[str]:
    """The names of whole modules that train with an adapter of this config."""
    return list(dict.fromkeys([*(config.modules_to_save or []), *TASK_HEADS.get(config.task_type or "", [])]))


def is_saved(config: LoraConfig, name: str) -> bool:
    """Whether a module, or one that it is part of, is trained as a whole."""
    return any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in saved_modules(config))


def names_to_train(model: nn.Module, config: LoraConfig, targets: Sequence[str]) -> list[str]:
    """The names of the parameters that train beside an adapter on the targets.

    Raises:
        ValueError: a module to save does not exist, or has a parameter that cannot train.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameters = {name: parameter for name, parameter in parameters.items() if ".lora_" not in name}
    ends = {wanted: _within(parameters, wanted) for wanted in saved_modules(config)}
    for wanted in config.modules_to_save or []:
        if not ends[wanted] and wanted not in TASK_HEADS.get(config.task_type or "", []):
            raise ValueError(f"modules_to_save: expected modules of this model with parameters, found {wanted!r}")
    found = list(dict.fromkeys(name for names in ends.values() for name in names))
    if config.bias == "all":
        once = [name for name, _ in model.named_parameters() if ".lora_" not in name]
        found += [name for name in once if name.endswith("bias") and name not in found]
    elif config.bias == "lora_only":
        found += [f"{target}.bias" for target in targets if f"{target}.bias" in parameters]
    for name in found:
        if not parameters[name].is_floating_point():
            raise ValueError(f"modules_to_save: expected floating-point weights, found {parameters[name].dtype} {name}")
    return found


def _within(names: Iterable[str], wanted: str) -> list[str]:
    """The parameters in modules whose names end in `wanted`, which need not begin at a dot: PEFT's rule here."""
    return [name for name in names if re.match(rf".*{re.escape(wanted)}\.", name)]


def add_copies(model: nn.Module, adapter: str, names: Sequence[str], values: dict[str, Tensor], config: LoraConfig,
               trainable: bool) -> None:  # fmt: skip
    """Makes an adapter's copies of parameters, with given values where there are some. They are not yet in place."""
    originals: dict[str, nn.Parameter] = model.__dict__.setdefault(_ORIGINALS, {})
    places = dict(model.named_parameters(remove_duplicate=False))
    copies: dict[str, nn.Parameter] = {}
    by_original: dict[int, nn.Parameter] = {}
    for name in names:
        original = originals.setdefault(name, places[name])
        value = values.get(name, original.data)
        copy = nn.Parameter(value.detach().to(original.device, original.dtype, copy=True), requires_grad=trainable)
        copies[name] = by_original.setdefault(id(original), copy) if config.ensure_weight_tying else copy
    for name, sharing in _sharing(places, names):
        if config.ensure_weight_tying or name.endswith("bias"):
            originals.setdefault(sharing, places[sharing])
            copies[sharing] = copies[name]
        else:
            logger.warning("%s is tied to %s, which stays; ensure_weight_tying=True trains both", name, sharing)
    if copies:
        model.__dict__.setdefault(_COPIES, {})[adapter] = copies


def _sharing(places: dict[str, nn.Parameter], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of a name and another one, not among the names, that has the same parameter."""
    for name in names:
        for other, parameter in places.items():
            if parameter is places[name] and other not in names:
                yield name, other


def copies_in_all_places(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's copies by the names of all parameters that they stand for."""
    copies = model.__dict__.get(_COPIES, {}).get(adapter, {})
    if adapter not in model.__dict__.get(_IN_PLACE, ()):
        return copies
    # Those in place are read there: FSDP2 puts shards in the place of the parameters that it was given.
    return {name: _place(model, name) for name in copies}


def _place(model: nn.Module, name: str) -> Any:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path)._parameters[attribute]


def copies_of(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's copies by parameter name; one that stands in several places goes by the first."""
    first: dict[int, str] = {}
    copies = copies_in_all_places(model, adapter)
    for name, copy in copies.items():
        first.setdefault(id(copy), name)
    return {name: copies[name] for name in first.values()}


def check_activatable(model: nn.Module, adapters: Sequence[str]) -> None:
    """Raises ValueError where two adapters would have copies of their own in one place, or none can be moved."""
    if model.__dict__.get(_ORIGINALS):
        check_whole(model)
    with_copies = [adapter for adapter in adapters if copies_of(model, adapter)]
    if len(with_copies) > 1:
        raise ValueError(f"adapter: expected one with trained modules or biases at a time, found {with_copies}")


def put_in_place(model: nn.Module, adapters: Sequence[str]) -> None:
    """Puts the adapters' copies in place, and the originals everywhere else."""
    parameters = dict(model.__dict__.get(_ORIGINALS, {}))
    for adapter in adapters:
        parameters |= copies_in_all_places(model, adapter)
    for name, parameter in parameters.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter.data = parameter.data.to(getattr(module, attribute).device)
        module._parameters[attribute] = parameter
    model.__dict__[_IN_PLACE] = tuple(adapters)


@contextmanager
def originals_in_place(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """The originals inside a `with` block, and the adapters' copies again behind it.

    Raises:
        ValueError: there are copies, and FSDP2 has sharded the model.
    """
    check_activatable(model, adapters)
    put_in_place(model, ())
    try:
        yield
    finally:
        put_in_place(model, adapters)


def forget(model: nn.Module, adapter: str, new_name: str | None = None) -> None:
    """Drops an adapter's copies, or gives them to another name."""
    copies: dict[str, Any] = model.__dict__.get(_COPIES, {})
    if adapter in copies:
        dropped = copies.pop(adapter)
        if new_name is not None:
            copies[new_name] = dropped
            in_place = model.__dict__.get(_IN_PLACE, ())
            model.__dict__[_IN_PLACE] = tuple(new_name if name == adapter else name for name in in_place)


def release(model: nn.Module, adapters: Sequence[str], keep: bool) -> None:
    """Ends the copies: those of the adapters stay in place for good if `keep`, else the originals come back."""
    put_in_place(model, adapters if keep else ())
    model.__dict__.pop(_COPIES, None)
    model.__dict__.pop(_ORIGINALS, None)
    model.__dict__.pop(_IN_PLACE, None)
