"""YAML whose every value knows the line that it is on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class Located:
    """Settings as dictionaries, and where each of them is from: "config.yaml, line 3" or "argument lora.r=8"."""

    values: dict[str, Any]
    places: dict[Path_, str]

    def place(self, path: Iterable[str | int]) -> str:
        """Where the setting at a path is from, or else the nearest one above it."""
        parts = tuple(path)
        return next(self.places[parts[:end]] for end in range(len(parts), -1, -1) if parts[:end] in self.places)


def read_yaml(file: Path, overrides: Iterable[str] = ()) -> Located:
    """A mapping from a YAML file, with `a.b=value` arguments, whose values are YAML too, in place of what it has.

    Raises:
        ValueError: it is no YAML, no mapping, or has a key twice; or an override is not of that form.
        OSError: the file cannot be read.
    """
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}{_line_of(error)}: expected YAML, found {_problem_of(error)}") from None
    places: dict[Path_, str] = {(): str(file)}
    values = {} if node is None else _value(node, (), file, places)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a mapping of settings, found {type(values).__name__}")
    for override in overrides:
        _override(values, places, override)
    return Located(values, places)


def _value(node: Any, path: Path_, file: Path, places: dict[Path_, str]) -> Any:
    places[path] = f"{file}, line {node.start_mark.line + 1}" if path else str(file)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, index), file, places) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return yaml.SafeLoader("").construct_object(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in mapping:
            raise ValueError(f"{file}, line {line}: expected each setting once, found {key!r} again")
        mapping[key] = _value(value_node, (*path, key), file, places)
        places[*path, key] = f"{file}, line {line}"
    return mapping


def _override(values: dict[str, Any], places: dict[Path_, str], override: str) -> None:
    name, equals, text = override.partition("=")
    if not name or not equals:
        raise ValueError(f"argument {override!r}: expected a setting of the form training.epochs=3")
    path = tuple(name.split("."))
    section = values
    for depth, key in enumerate(path[:-1], start=1):
        if not isinstance(section.get(key), dict):
            section[key] = {}
            places[path[:depth]] = f"argument {override}"
        section = section[key]
    try:
        section[path[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"argument {override!r}: expected a YAML value, found {_problem_of(error)}") from None
    places[path] = f"argument {override}"


def _line_of(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"


def _problem_of(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error)
