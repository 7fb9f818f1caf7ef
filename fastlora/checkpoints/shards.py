"""Checkpoints of safetensors files, read and written a piece at a time.

A file is a header length (8 bytes, little-endian), a JSON header with a dtype, a shape and offsets for every tensor,
and the tensors' bytes. A copy with other values of the same dtypes and shapes has the same header.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..adapters.files import sync

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64}  # of quantised weights
NUMBERED = re.compile(r"model-\d+-of-\d+\.safetensors")
MAX_HEADER = 100_000_000  # bytes, the limit of the format's own reader
CHUNK = 1 << 22  # bytes copied at once


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its dtype in the format's words, and where its bytes begin and end.

    It is read at its place, whatever the file's position, so that threads may share an open file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    path: Path

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return math.prod(self.shape[1:])

    def read(self, file: BinaryIO, rows: slice) -> Tensor:
        """Rows of the tensor, as a tensor of its own."""
        dtype = (DTYPES | CODES)[self.dtype]
        tensor = torch.empty(len(range(*rows.indices(self.rows))), *self.shape[1:], dtype=dtype)
        if tensor.numel():
            start = self.start + rows.start * self.columns * dtype.itemsize
            fill(tensor.flatten().view(torch.uint8).numpy().data, file, start, self.name)
        return tensor


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in the order of their bytes, which begin at `data` and end with the file."""

    path: Path
    entries: tuple[Entry, ...]
    data: int
    size: int


def find_shards(folder: Path) -> list[Shard]:
    """The headers of a checkpoint's files.

    Raises:
        ValueError: there is no checkpoint of safetensors files, or one is missing or damaged.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise ValueError(f"base: expected {SINGLE_FILE} or {INDEX_FILE}, found {_instead(folder)}")
        _check_no_others(folder, {SINGLE_FILE})
        return [read_header(folder / SINGLE_FILE)]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{index}: expected a weight_map of tensor and file names, found {places!r}")
    for name in set(places.values()):
        if Path(name).name != name or not name.endswith(".safetensors") or name.startswith("."):
            raise ValueError(f"{index}: expected names of safetensors files beside it, found {name!r}")
    _check_no_others(folder, set(places.values()))
    shards = [read_header(folder / name) for name in sorted(set(places.values()))]
    found = {entry.name: shard.path.name for shard in shards for entry in shard.entries}
    if found != places or sum(len(shard.entries) for shard in shards) != len(found):
        wrong = sorted({name for name in found | places if found.get(name) != places.get(name)})
        raise ValueError(f"{index}: expected the tensors of its files, each once, found others: {wrong[:3]}")
    return shards


def _instead(folder: Path) -> str:
    """What a folder without safetensors files has, in words."""
    pickles = sorted(file.name for file in folder.glob("*.bin")) if folder.is_dir() else []
    if pickles:
        return (
            f"{pickles[0]} in {str(folder)!r}, a pickle, which can run any code and is never read; where you trust it, "
            "load it with transformers and save it again with save_pretrained"
        )
    return f"neither in {str(folder)!r}" if folder.is_dir() else f"no folder {str(folder)!r}"


def _check_no_others(folder: Path, names: set[str]) -> None:
    """Refuses shards that the checkpoint does not speak of, which are left of another one or tell of a wrong index."""
    others = sorted(file.name for file in folder.glob("*.safetensors") if NUMBERED.fullmatch(file.name))
    if extra := [name for name in others if name not in names]:
        raise ValueError(f"base: expected the shards {sorted(names)[:3]}, found others in its folder: {extra[:3]}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: there is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, found {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_header(path: Path) -> Shard:
    """The tensors of a file.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, found none")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: expected a whole safetensors file, found a header of {length} in {size} bytes")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
            header.pop("__metadata__", None)
            entries = [_entry(name, values, 8 + length, path) for name, values in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a header of the safetensors format, found {error!r}") from None
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    ends = [8 + length, *(entry.stop for entry in entries)]
    for entry, end in zip(entries, ends, strict=False):
        wanted = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else None
        if entry.start != end or entry.stop < end or wanted not in (None, entry.stop - entry.start):
            raise ValueError(f"{path}: expected {entry.name} to fill its place, found other offsets")
    if ends[-1] != size:
        raise ValueError(f"{path}: expected a whole safetensors file of {ends[-1]} bytes, found {size}")
    return Shard(path, tuple(entries), 8 + length, size)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of whose equal names the parser would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"more than one {next(name for name in found if names.count(name) > 1)!r}")
    return found


def _entry(name: str, values: dict[str, Any], data: int, path: Path) -> Entry:
    start, stop = values["data_offsets"]
    shape = tuple(values["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
        raise ValueError(f"negative or broken sizes of {name}")
    return Entry(name, str(values["dtype"]), shape, data + start, data + stop, path)


@contextmanager
def published(file: Path) -> Iterator[BinaryIO]:
    """A file to write that has its name only once it is whole and on the disk."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("xb") as output:  # a new one, for a link that stands there would lead elsewhere
            yield output
            output.flush()
            os.fsync(output.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    sync(file.parent)


def fill(buffer: memoryview, file: BinaryIO, start: int, what: str) -> None:
    """Fills a buffer with the bytes of a file from a place on.

    Raises:
        ValueError: the file ends before.
    """
    done = 0
    while done < len(buffer):
        read = os.preadv(file.fileno(), [buffer[done:]], start + done)
        if not read:
            raise ValueError(f"{file.name}: expected {what} whole, found the end of the file")
        done += read


def same_bytes(first: BinaryIO, entry: Entry, second: BinaryIO, other: Entry) -> bool:
    """Whether two tensors have the same bytes."""
    length = entry.stop - entry.start
    if length != other.stop - other.start:
        return False
    first.seek(entry.start)
    second.seek(other.start)
    pieces = (min(CHUNK, length - at) for at in range(0, length, CHUNK))
    return all(first.read(piece) == second.read(piece) for piece in pieces)
