"""Writing a merged checkpoint in other dtypes: 16-bit, or linear layers in int8, quantised once from float32.

One block of one tensor is in memory at a time, but for weights that are stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .changes import Change
from .int8 import Int8Format, Specs
from .layout import Layout, lay_out
from .linears import Linears
from .report import Difference, LayerError
from .shards import DTYPES, Entry, Shard, copy_range, published

CACHED = 1 << 18  # elements quantised at once, which stay in a core's cache


@dataclass(frozen=True)
class Conversion:
    """What becomes of the tensors of a checkpoint.

    Attributes:
        changes: by tensor, what the adapter does to it.
        main: the dtype of the model's weights, in the format's words.
        dtype: what tensors of that dtype are stored in.
        format: the int8 format of the linear layers, None where they stay dense.
        linears: which these are.
        device: where to compute.
    """

    changes: dict[str, Change]
    main: str
    dtype: str
    format: Int8Format | None
    linears: Linears
    device: Any

    def specs(self, entry: Entry) -> Specs:
        """What a tensor of the base is stored as, by the names of the parts."""
        if self.format is not None and entry.name in self.linears.quantized:
            N, K = self.shape(entry)
            parts = self.format.specs(N, K, self.dtype)
            return {part_name(entry, part): spec for part, spec in parts.items()}
        converted = entry.dtype == self.main and entry.shape
        return {entry.name: (self.dtype if converted else entry.dtype, entry.shape)}

    def shape(self, entry: Entry) -> tuple[int, int]:
        """`[N, K]` of a linear layer's weight."""
        N, K = entry.shape
        return (K, N) if self.linears.quantized[entry.name] else (N, K)

    def merged(self, entry: Entry, file: BinaryIO) -> Iterator[Tensor]:
        """The merged weight in float32, rows after rows; those of a linear layer are its output features."""
        blocks = self.changes.get(entry.name, Change()).blocks(entry, file, self.device, torch.float32)
        if self.linears.quantized.get(entry.name):
            blocks = iter([torch.cat(list(blocks)).T.contiguous()])
        for block in blocks:
            yield from block.split(max(1, CACHED // max(1, block[:1].numel())))


def part_name(entry: Entry, part: str) -> str:
    """The whole name of a stored part of a linear layer's weight."""
    return entry.name.removesuffix("weight") + part


def write_shard(
    shard: Shard, conversion: Conversion, target: Path, errors: list[LayerError]
) -> Iterator[int]:  # fmt: skip
    """Writes one file, yields the bytes of every piece, and notes the errors of its int8 weights."""
    specs: Specs = {}
    for entry in shard.entries:
        specs |= conversion.specs(entry)
    layout = lay_out(specs)
    with shard.path.open("rb") as source, published(target) as output:
        output.write(layout.header)
        for entry in shard.entries:
            if conversion.format is not None and entry.name in conversion.linears.quantized:
                error = Difference()
                yield from _write_int8(entry, conversion, conversion.format, source, layout, output, error)
                errors.append(LayerError(entry.name, error.relative_rms))
            elif entry.name in conversion.changes or specs[entry.name][0] != entry.dtype:
                dtype = DTYPES[specs[entry.name][0]]
                for block in conversion.merged(entry, source):
                    yield layout.write(output, entry.name, _rounded(block, dtype, entry))
            else:
                output.seek(layout.places[entry.name])
                yield from copy_range(source, output, entry.start, entry.stop)


def _write_int8(
    entry: Entry, conversion: Conversion, format: Int8Format, source: BinaryIO, layout: Layout, output: BinaryIO,
    error: Difference,
) -> Iterator[int]:  # fmt: skip
    N, K = conversion.shape(entry)
    for part, tensor in format.constants(N, K).items():
        yield layout.write(output, part_name(entry, part), tensor)
    for rows in conversion.merged(entry, source):
        stored = format.quantize(rows, conversion.dtype)
        yield sum(layout.write(output, part_name(entry, part), tensor) for part, tensor in stored.items())
        error.add(rows, format.dequantize(stored, K))


def _rounded(block: Tensor, dtype: torch.dtype, entry: Entry) -> Tensor:
    rounded = block.to(dtype)
    if not torch.isfinite(rounded).all():
        raise ValueError(
            f"{entry.name}: expected merged weights in the range of {dtype}, found {block.abs().max():.3g}"
        )
    return rounded
