"""Int8 weights in the files of a checkpoint, read back a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .convert import Conversion, part_name
from .int8 import Int8Format
from .report import Difference, LayerError
from .shards import DTYPES, Entry, Shard, read_header

SCALES = ("weight_scale", "SCB")


class Files:
    """The tensors of a checkpoint's files, by name; `used` are those that were asked for."""

    def __init__(self, shards: list[Shard]) -> None:
        self.places = {entry.name: (shard.path, entry) for shard in shards for entry in shard.entries}
        self.used: set[str] = set()

    def find(self, name: str) -> tuple[Path, Entry] | None:
        self.used.add(name)
        return self.places.get(name)


@dataclass(frozen=True)
class Stored:
    """An int8 weight `[N, K]`: its format, and in which file each of its parts is."""

    format: Int8Format
    N: int
    K: int
    parts: dict[str, tuple[Path, Entry]]

    @property
    def scale_dtype(self) -> str:
        return next(entry.dtype for part, (_, entry) in self.parts.items() if part in SCALES)

    def problem(self) -> str | None:
        """What is wrong with the parts' dtypes, shapes or constants."""
        if self.scale_dtype not in DTYPES:
            return f"expected a scale in one of {list(DTYPES)}, found {self.scale_dtype}"
        for part, spec in self.format.specs(self.N, self.K, self.scale_dtype).items():
            entry = self.parts[part][1]
            if (entry.dtype, entry.shape) != spec:
                return f"expected {part} {spec[0]} {list(spec[1])}, found {entry.dtype} {list(entry.shape)}"
        for part, expected in self.format.constants(self.N, self.K).items():
            path, entry = self.parts[part]
            with path.open("rb") as file:
                found = entry.read(file, slice(0, entry.rows))
            if not torch.equal(found.flatten(), expected.flatten()):
                return f"expected {part} {expected.tolist()}, found {found.tolist()}"
        return None

    def beside(self, merged: Iterable[tuple[slice, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows, each with what the files have for it, in float32."""
        constant = self.format.constants(self.N, self.K)
        with ExitStack() as stack:
            opened = {
                part: (stack.enter_context(path.open("rb")), entry)
                for part, (path, entry) in self.parts.items() if part not in constant
            }  # fmt: skip
            for rows, block in merged:
                found = {part: entry.read(file, rows).to(block.device) for part, (file, entry) in opened.items()}
                yield block, self.format.dequantize(found, self.K)


def find_stored(entry: Entry, conversion: Conversion, files: Files) -> Stored | None:
    """The int8 parts of a weight of the base, None where it is dense."""
    if conversion.format is None or len(entry.shape) != 2 or not entry.name.endswith(".weight"):
        return None
    names = {part: part_name(entry, part) for part in conversion.format.specs(1, 1, "F32")}
    if not names.keys() <= {part for part, name in names.items() if name in files.places}:
        return None
    files.used |= set(names.values())
    N, K = reversed(entry.shape) if conversion.linears.quantized.get(entry.name) else entry.shape
    return Stored(conversion.format, N, K, {part: files.places[name] for part, name in names.items()})


def layer_errors(entries: list[Entry], conversion: Conversion, target: Path) -> list[LayerError]:
    """The errors of the int8 weights of a file that is written already, from tensors of one file of the base."""
    files, errors = Files([read_header(target)]), []
    with entries[0].path.open("rb") as source:
        for entry in entries:
            stored = find_stored(entry, conversion, files)
            if stored is None:
                continue
            error = Difference()
            for expected, found in stored.beside(conversion.merged(entry, source)):
                error.add(expected, found)
            errors.append(LayerError(entry.name, error.relative_rms))
    return errors
