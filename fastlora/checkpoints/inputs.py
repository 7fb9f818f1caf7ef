"""A base and adapters as they are given: read, checked, and matched tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from ..adapters.files import WEIGHTS_FILE, read_tensors
from ..config import CONFIG_FILE, LoraConfig
from ..log import logger
from .change import Change
from .changes import Adapter, find_all_changes
from .ends import find_ends
from .folder import SETTINGS_FILE, fingerprint, sha256, small_files
from .shards import Entry, Shard, find_shards, read_json

AnyPath = str | PathLike[str]
AnyAdapters = AnyPath | Sequence[AnyPath] | Mapping[str, float] | Mapping[Path, float] | Mapping[AnyPath, float]


@dataclass(frozen=True)
class Inputs:
    """What a merge is made of.

    Attributes:
        base: the base's folder.
        folders: the weights of the adapters by folder.
        shards: the base's files.
        settings: the values of its config.json.
        changes: by tensor, what the adapters do to it.
        untied: whether tied embeddings become two tensors.
        new: the tensors that the base lacks, by name, each with the one whose values it begins with.
    """

    base: Path
    folders: dict[Path, float]
    shards: list[Shard]
    settings: dict[str, Any]
    changes: dict[str, Change]
    untied: bool
    new: dict[str, Entry]

    def entries(self, shard: Shard) -> list[Entry]:
        """The tensors of a file, and those that are new behind them."""
        new = [replace(entry, name=name) for name, entry in self.new.items() if entry.path == shard.path]
        return [*shard.entries, *new]

    def manifest(self, **values: Any) -> bytes:
        """What the inputs are, in a text: the files of the first adapter by name, the others by their order."""
        first, *others = self.folders
        hashes = [[sha256(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)] for folder in others]
        more = {"others": hashes, "factors": list(self.folders.values())} if others or self.folders[first] != 1 else {}
        return fingerprint(self.shards, small_files(self.base), first, **more, **values)


def read_inputs(base: Path, folders: dict[Path, float]) -> Inputs:
    """Reads the headers of a base and the adapters.

    Raises:
        ValueError: they are not what they should be, or do not fit each other.
    """
    shards, settings = find_shards(base), read_settings(base)
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    adapters = [_read(folder, weight, base, settings) for folder, weight in folders.items()]
    changes, untied = find_all_changes(adapters, entries, settings)
    ends = find_ends(entries, settings)
    new = {name: entries[ends.embedding] for name in changes if name not in entries} if untied and ends else {}
    return Inputs(base, folders, shards, settings, changes, untied, new)


def read_settings(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json, none where there is no such file."""
    return read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}


def by_folder(adapter: Any) -> dict[Path, float]:
    """The weights of adapters by folder.

    Raises:
        TypeError, ValueError: there are none, one stands twice, or a weight is no finite number.
    """
    if isinstance(adapter, str | PathLike):
        adapter = [adapter]
    if not isinstance(adapter, Mapping):
        paths = [Path(path) for path in adapter]
        if twice := [str(path) for path in paths if paths.count(path) > 1]:
            raise ValueError(f"adapter: expected different folders, found {twice[0]!r} twice")
        adapter = dict.fromkeys(paths, 1.0)
    if not adapter:
        raise ValueError("adapter: expected at least one folder, found none")
    for path, weight in adapter.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"adapter: expected a number as the weight of {fspath(path)!r}, found {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"adapter: expected a finite weight of {fspath(path)!r}, found {weight!r}")
    return {Path(path): weight for path, weight in adapter.items()}


def _read(folder: Path, weight: float, base: Path, settings: dict[str, Any]) -> Adapter:
    adapter = Adapter(LoraConfig.from_folder(folder), read_tensors(folder), weight)
    if not adapter.tensors:
        raise ValueError(f"{folder}: expected LoRA weights, found an empty file")
    _warn_of_another_base(adapter.config.base_model_name_or_path, base, settings, folder)
    return adapter


def _warn_of_another_base(wanted: str | None, base: Path, settings: dict[str, Any], folder: Path) -> None:
    """All shapes may fit, so that the name may just be another path to the same model: this is no error."""
    if not wanted:
        return
    # The hub's cache has models--owner--name/snapshots/<commit>.
    parts = [*base.resolve().parts, *Path(str(settings.get("_name_or_path", ""))).parts]
    if not any(part == Path(wanted).name or part.endswith(f"--{Path(wanted).name}") for part in parts):
        logger.warning("%s: the adapter was made for %r, and is merged into %r", folder, wanted, str(base))
