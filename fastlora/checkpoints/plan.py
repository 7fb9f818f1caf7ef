"""Which files a merge writes: those of the base, with the same bytes in front where no tensor is new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .change import Change
from .ends import untied_settings
from .folder import SETTINGS_FILE, small_files
from .pieces import Place
from .shards import INDEX_FILE, Entry, Shard, read_json

ALIGNMENT = 8  # bytes, of the tensors' beginning


@dataclass(frozen=True)
class NewFile:
    """A file of tensors: its name, its first bytes, what follows them, and its size in bytes."""

    name: str
    header: bytes
    places: list[Place]
    size: int


def plan_weights(shards: list[Shard], changes: Mapping[str, Change], new: Mapping[str, Entry]) -> list[NewFile]:
    """The files of a merged checkpoint.

    Args:
        new: the tensors that the base lacks, by name, each with the one whose values it begins with. It goes into the
            same file, behind the others.
    """
    files = []
    for shard in shards:
        here = {name: entry for name, entry in new.items() if entry.path == shard.path}
        header = _with_tensors(shard, here) if here else _first_bytes(shard)
        places = [
            Place(entry, entry.start - shard.data + len(header), changes.get(entry.name)) for entry in shard.entries
        ]
        end = shard.size - shard.data + len(header)
        for name, entry in here.items():
            places.append(Place(entry, end, changes[name]))
            end += entry.stop - entry.start
        files.append(NewFile(shard.path.name, header, places, end))
    return files


def _first_bytes(shard: Shard) -> bytes:
    with shard.path.open("rb") as file:
        return file.read(shard.data)


def _with_tensors(shard: Shard, new: Mapping[str, Entry]) -> bytes:
    """The first bytes of a file with more tensors behind the others."""
    values = json.loads(_first_bytes(shard)[8:])
    end = shard.size - shard.data
    for name, entry in new.items():
        start, end = end, end + entry.stop - entry.start
        values[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(values, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def plan_small_files(base: Path, new: Mapping[str, Entry], untied: bool) -> dict[str, bytes]:
    """The other files by name, in the order of writing; index and config.json say what is new."""
    files = {file.name: file.read_bytes() for file in small_files(base)}
    if new and INDEX_FILE in files:
        index = read_json(base / INDEX_FILE)
        index["weight_map"] |= {name: entry.path.name for name, entry in new.items()}
        if "total_size" in (metadata := index.setdefault("metadata", {})):
            metadata["total_size"] += sum(entry.stop - entry.start for entry in new.values())
        files[INDEX_FILE] = _text(index)
    if untied and SETTINGS_FILE in files:
        files[SETTINGS_FILE] = _text(untied_settings(read_json(base / SETTINGS_FILE)))
    return files


def _text(values: dict) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
