"""Adapters on parameters (`target_parameters`), such as the fused experts of a mixture, in a checkpoint's files.

The files have a fused parameter as it is, `[E, out, in]` or `[E, in, out]`, or its experts one by one, each in one or
two matrices, as transformers saves most mixtures:

    experts.gate_up_proj[e] = [experts.e.gate_proj.weight; experts.e.up_proj.weight]    and w1; w3
    experts.down_proj[e]    =  experts.e.down_proj.weight                               and w2

PEFT's files do not say which parameter of a module an adapter is for: it shows in the shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..config import LoraConfig
from ..models.targets import rank_of, scaling_of
from .change import Term
from .names import same_tensor
from .shards import Entry

BASE_LAYER = ".base_layer"
# The parts of a fused parameter, by the names that models give them.
PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
ORDER = list(PARTS)  # in which a module has them
RENAMED = (".mlp.", ".block_sparse_moe.")  # what the path of Mixtral's experts is in the model, and in its files


@dataclass(frozen=True)
class Parameter:
    """A parameter of a module: its whole name and shape `[E, rows, columns]`, E 1 where it is a matrix.

    Attributes:
        places: the tensors that hold it, each with its expert, None for one of three axes, and its rows.
    """

    name: str
    shape: tuple[int, int, int]
    places: list[tuple[str, int | None, slice]]


def split_path(path: str) -> tuple[str, int]:
    """The module that a path of PEFT's names means, and how many wrappers are around this one."""
    depth = 0
    while path.endswith(BASE_LAYER):
        path, depth = path.removesuffix(BASE_LAYER), depth + 1
    return path, depth


def find_parameters(module: str, config: LoraConfig, entries: Mapping[str, Entry]) -> list[Parameter]:
    """The parameters of a module that the config selects and the checkpoint has, in the order of the module."""
    names = []
    for target in config.target_parameters or []:
        path, _, own = target.rpartition(".")
        if not path or f".{module}".endswith(f".{path}"):
            names.append(own)
    names = sorted(dict.fromkeys(names), key=lambda name: ORDER.index(name) if name in ORDER else -1)
    found = [_find(f"{module}.{name}", entries) for name in names]
    return [parameter for parameter in found if parameter is not None]


def _find(name: str, entries: Mapping[str, Entry]) -> Parameter | None:
    here = same_tensor(name, entries)
    if len(here) == 1 and len(shape := entries[here[0]].shape) in (2, 3):
        experts, rows, columns = shape if len(shape) == 3 else (1, *shape)
        return Parameter(name, (experts, rows, columns), [(here[0], None if len(shape) == 3 else 0, slice(0, rows))])
    module, _, own = name.rpartition(".")
    for path, parts in itertools.product((module, module.replace(*RENAMED)), PARTS.get(own, ())):
        if (parameter := _one_by_one(name, path, parts, entries)) is not None:
            return parameter
    return None


def _one_by_one(name: str, path: str, parts: tuple[str, ...], entries: Mapping[str, Entry]) -> Parameter | None:
    """A parameter whose experts have matrices of their own, all of one shape."""
    places: list[tuple[str, int | None, slice]] = []
    shapes: set[tuple[int, ...]] = set()
    for expert in itertools.count():
        found = [same_tensor(f"{path}.{expert}.{part}.weight", entries) for part in parts]
        if not all(len(names) == 1 for names in found):
            break
        for index, (tensor,) in enumerate(found):
            shapes.add(entries[tensor].shape)
            rows = entries[tensor].rows
            places.append((tensor, expert, slice(index * rows, (index + 1) * rows)))
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2:
        return None
    return Parameter(name, (len(places) // len(parts), shape[0] * len(parts), shape[1]), places)


def terms_of(
    module: str, pairs: dict[int, tuple[Tensor, Tensor]], config: LoraConfig, entries: Mapping[str, Entry],
    weight: float,
) -> Iterator[tuple[str, Term]]:  # fmt: skip
    """What each tensor of the checkpoint has added.

    Args:
        module: the module's path.
        pairs: A `[E * R, in]` and B `[out, R * E]` by the number of wrappers around theirs.
        weight: of the adapter.

    Raises:
        ValueError: they fit no parameters, or more than one way.
    """
    parameters = find_parameters(module, config, entries)
    ordered = [pairs[depth] for depth in sorted(pairs, reverse=True)]  # the first parameter is wrapped first
    fitting = [
        order for order in itertools.permutations(parameters, len(ordered))
        if all(_layouts(parameter, pair, config) for parameter, pair in zip(order, ordered, strict=True))
    ]  # fmt: skip
    if not fitting or sorted(pairs) != list(range(len(pairs))):
        shapes = {parameter.name: list(parameter.shape) for parameter in parameters}
        found = [[list(tensor.shape) for tensor in pair] for pair in ordered]
        raise ValueError(f"{module}: expected A and B for target_parameters among {shapes}, found shapes {found}")
    # Where two fit alike, PEFT wrapped them in the order of the module.
    matched = list(zip(fitting[0], ordered, strict=True))
    transposed = _is_transposed(matched, config, entries)
    for parameter, pair in matched:
        yield from _terms(parameter, pair, config, weight, transposed)


def _layouts(parameter: Parameter, pair: tuple[Tensor, Tensor], config: LoraConfig) -> set[bool]:
    """Whether A and B fit a parameter as `[E, out, in]` (False) and as `[E, in, out]` (True)."""
    (a, b), (experts, rows, columns) = pair, parameter.shape
    if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == experts * rank_of(config, parameter.name):
        return set()
    fits = {False: (b.shape[0], a.shape[1]) == (rows, columns)}
    if parameter.places[0][1] is None:
        fits[True] = (a.shape[1], b.shape[0]) == (rows, columns)
    return {layout for layout, fit in fits.items() if fit}


def _is_transposed(
    matched: list[tuple[Parameter, tuple[Tensor, Tensor]]], config: LoraConfig, entries: Mapping[str, Entry]
) -> bool:
    """The layout of a module's parameters, which those that are not square show."""
    for parameter, pair in matched:
        layouts = _layouts(parameter, pair, config)
        if len(layouts) == 1:
            return layouts.pop()
    parameter = matched[0][0]
    # gate_up_proj is [E, 2 I, H] or [E, H, 2 I].
    gate_up = _find(f"{parameter.name.rpartition('.')[0]}.gate_up_proj", entries)
    _, rows, columns = parameter.shape if gate_up is None else gate_up.shape
    if rows == columns:
        raise ValueError(f"{parameter.name}: expected a shape that shows the layout, found {list(parameter.shape)}")
    return columns > rows


def _terms(
    parameter: Parameter, pair: tuple[Tensor, Tensor], config: LoraConfig, weight: float, transposed: bool
) -> Iterator[tuple[str, Term]]:
    (a, b), experts = pair, parameter.shape[0]
    scale = weight * scaling_of(config, parameter.name)
    if transposed:
        right, left = b.view(b.shape[0], -1, experts).permute(2, 1, 0), a.view(experts, -1, a.shape[1]).mT
    else:
        right, left = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    for name, expert, rows in parameter.places:
        if expert is not None:
            yield name, Term(right[expert], left[expert, rows], scale)
        else:
            yield name, Term(right, left, scale)
