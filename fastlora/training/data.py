"""Rows of text from files or the hub: JSONL and plain text by themselves, the rest with the `datasets` library."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import Data

_READ_BY_DATASETS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
# The columns that say by their names what they are, the first that fit; an instruction's input follows it.
_KNOWN = (("messages",), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"), ("text",))


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        place: where it is from, in words.
        messages: a conversation, or None.
        prompt, completion: a pair; a text alone is a completion without a prompt.
        continuous: whether it is a text to be cut into sequences, whatever its length.
    """

    place: str
    messages: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    continuous: bool = False


def read_rows(settings: Data) -> tuple[list[Row], list[Row]]:
    """Rows to train on and to evaluate on; those held out are drawn with a seed of their own, the same in every run.

    Raises:
        ValueError: there are no rows, a row is damaged, or columns are missing; the file and the line are named.
        OSError: a file cannot be read.
        ImportError: the library that reads the format is not installed.
    """
    rows = _read(settings.train, settings)
    if settings.eval is not None:
        return rows, _read(settings.eval, settings)
    held_out = round(settings.eval_share * len(rows))
    if settings.eval_share and not 0 < held_out < len(rows):
        raise ValueError(
            f"data.eval_share: expected a share that leaves rows on both sides, found {settings.eval_share} of "
            f"{len(rows)}"
        )
    chosen = set(random.Random(0).sample(range(len(rows)), held_out))
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def _read(source: str, settings: Data) -> list[Row]:
    suffix = Path(source).suffix.lower()
    if suffix == ".txt":
        text = _text_of(source)
        rows = [Row(source, completion=text, continuous=True)] if text.strip() else []
    else:
        objects = _json_lines(source) if suffix == ".jsonl" else _by_datasets(source, suffix, settings.split)
        rows = _rows(objects, settings)
    if not rows:
        raise ValueError(f"{source}: expected rows, found none")
    return rows


def _text_of(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: expected UTF-8, found byte {error.start} of {error.reason}") from None


def _json_lines(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Lines end at \n alone: text may have the other separators that str.splitlines knows.
    for number, line in enumerate(_text_of(source).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{place}: expected a JSON object, found a line that is cut off or none: {error}"
            ) from None
        if not isinstance(value, dict):
            raise ValueError(f"{place}: expected a JSON object, found {type(value).__name__}")
        yield place, value


def _by_datasets(source: str, suffix: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = _READ_BY_DATASETS.get(suffix)
    if kind is not None and not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{source}: expected the library that reads it, found none: pip install datasets") from None
    try:
        if kind is None:
            found = datasets.load_dataset(source, split=split)
        else:
            found = datasets.load_dataset(kind, data_files=source, split="train")
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source}: expected {suffix or 'a dataset'}, found {error.__cause__ or error}") from None
    for index, value in enumerate(found):
        yield f"{source}, row {index + 1}", value


def _rows(objects: Iterator[tuple[str, dict[str, Any]]], settings: Data) -> list[Row]:
    rows, columns = [], None
    for place, value in objects:
        columns = columns or _columns(place, value, settings)
        rows.append(_row(place, value, columns))
    return rows


def _columns(place: str, value: dict[str, Any], settings: Data) -> dict[str, str]:
    """The data's names of messages, of prompt and completion, or of text, by ours."""
    named = {ours: theirs for ours, theirs in settings.columns.model_dump().items() if theirs is not None}
    if named and set(named) not in ({"messages"}, {"prompt", "completion"}, {"text"}):
        raise ValueError(
            f"data.columns: expected messages, prompt and completion, or text, found {' and '.join(sorted(named))}"
        )
    if named:
        return named
    for names in _KNOWN:
        if all(name in value for name in names):
            ours = names if len(names) == 1 else ("prompt", "completion")
            return dict(zip(ours, names, strict=True))
    raise ValueError(
        f"{place}: expected the columns {'; '.join(' and '.join(names) for names in _KNOWN)}; found "
        f"{' and '.join(map(str, value)) or 'none'}; name them, such as data.columns.prompt=NAME "
        "data.columns.completion=NAME"
    )


def _row(place: str, value: dict[str, Any], columns: dict[str, str]) -> Row:
    for name in columns.values():
        if name not in value:
            raise ValueError(f"{place}: expected the column {name!r}, found {' and '.join(map(str, value)) or 'none'}")
    if "messages" in columns:
        return Row(place, messages=_checked_messages(place, columns["messages"], value[columns["messages"]]))
    texts = {ours: value[theirs] for ours, theirs in columns.items()}
    for ours, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{place}: expected text in {columns[ours]!r}, found {type(text).__name__}")
    if "text" in texts:
        return Row(place, completion=texts["text"])
    more = value.get("input") if columns["prompt"] == "instruction" else None
    prompt = f"{texts['prompt']}\n{more}" if more else texts["prompt"]
    return Row(place, prompt=prompt if columns["prompt"] == "prompt" else f"{prompt}\n", completion=texts["completion"])


def _checked_messages(place: str, column: str, messages: Any) -> list[dict[str, Any]]:
    fit = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )
    if not fit or not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{place}: expected in {column!r} a list of messages with role and content, one of the assistant's among "
            f"them, found {str(messages)[:80]}"
        )
    return messages
