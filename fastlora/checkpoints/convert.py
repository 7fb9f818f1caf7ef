"""Writing a merged checkpoint in other dtypes: 16-bit, or linear layers in int8, quantised once from float32.

Some rows of a tensor are in memory at a time, but for weights that are stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .change import Change
from .int8 import Int8Format, Specs
from .layout import Layout, lay_out
from .linears import Linears
from .pieces import Piece, Place, pieces_of, run, turns_on, write_at
from .report import Difference, LayerError
from .shards import DTYPES, Entry, published

CACHED = 1 << 18  # elements quantised at once, which stay in a core's cache


@dataclass(frozen=True)
class Conversion:
    """What becomes of the tensors of a checkpoint.

    Attributes:
        changes: by tensor, what the adapters do to it.
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

    def is_int8(self, entry: Entry) -> bool:
        return self.format is not None and entry.name in self.linears.quantized

    def specs(self, entry: Entry) -> Specs:
        """What a tensor of the base is stored as, by the names of the parts."""
        if self.format is not None and self.is_int8(entry):
            parts = self.format.specs(*self.shape(entry), self.dtype)
            return {part_name(entry, part): spec for part, spec in parts.items()}
        converted = entry.dtype == self.main and entry.shape
        return {entry.name: (self.dtype if converted else entry.dtype, entry.shape)}

    def shape(self, entry: Entry) -> tuple[int, int]:
        """`[N, K]` of a linear layer's weight."""
        N, K = entry.shape
        return (K, N) if self._is_transposed(entry) else (N, K)

    def merged(self, entry: Entry, file: BinaryIO) -> Iterator[tuple[slice, Tensor]]:
        """The merged weight in float32, rows after rows; those of a linear layer are its output features."""
        for rows in self.steps(entry):
            yield from self.rows(entry, file, rows)

    def steps(self, entry: Entry) -> list[slice]:
        """Which rows are computed at once."""
        if self._is_transposed(entry):
            return [slice(0, self.shape(entry)[0])]
        return self._change(entry).steps(entry)

    def rows(self, entry: Entry, file: BinaryIO, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Those of one step, in blocks that fit a cache."""
        change = self._change(entry)
        if self._is_transposed(entry):
            stored = [change.rows(entry, file, part, self.device, torch.float32) for part in change.steps(entry)]
            block = torch.cat(stored).T.contiguous()
        else:
            block = change.rows(entry, file, rows, self.device, torch.float32)
        start = rows.start
        for part in block.split(max(1, CACHED // max(1, block[:1].numel()))):
            yield slice(start, start + len(part)), part
            start += len(part)

    def _is_transposed(self, entry: Entry) -> bool:
        return self.linears.quantized.get(entry.name, False)

    def _change(self, entry: Entry) -> Change:
        return self.changes.get(entry.name, Change())


def part_name(entry: Entry, part: str) -> str:
    """The whole name of a stored part of a linear layer's weight."""
    return entry.name.removesuffix("weight") + part


def specs_of(entries: list[Entry], conversion: Conversion) -> Specs:
    """The tensors of a file, by name."""
    return {name: spec for entry in entries for name, spec in conversion.specs(entry).items()}


def write_file_of(
    entries: list[Entry], conversion: Conversion, target: Path, errors: list[LayerError]
) -> Iterator[int]:  # fmt: skip
    """Writes one file, yields the bytes of every piece, and notes the errors of its int8 weights.

    Args:
        entries: tensors of one file of the base.
    """
    layout = lay_out(specs_of(entries, conversion))
    differences: dict[str, Difference] = {}
    with entries[0].path.open("rb") as source, published(target) as output:
        output.write(layout.header)
        output.flush()
        yield len(layout.header)
        pieces: list[Piece] = []
        computing = turns_on(conversion.device)
        for entry in entries:
            if conversion.is_int8(entry):
                differences[entry.name] = Difference()
                pieces += _int8(entry, conversion, source, layout, output, differences[entry.name])
            elif conversion.specs(entry)[entry.name][0] != entry.dtype:
                pieces += _rounded(entry, conversion, source, layout, output)
            else:
                place = Place(entry, layout.places[entry.name], conversion.changes.get(entry.name))
                pieces += pieces_of(place, source, output, conversion.device, computing)
        yield from run(pieces)
    errors += [LayerError(name, difference.relative_rms) for name, difference in differences.items()]


def _int8(
    entry: Entry, conversion: Conversion, source: BinaryIO, layout: Layout, output: BinaryIO, error: Difference
) -> Iterator[Piece]:  # fmt: skip
    """The work of writing an int8 weight: its constants, then some rows after others."""
    format, (N, K) = conversion.format, conversion.shape(entry)
    assert format is not None, "there are no int8 weights without one"

    def write(part: str, tensor: Tensor, row: int) -> int:
        bytes_before = row * (tensor.nbytes // max(1, len(tensor))) if row else 0
        return write_at(tensor, output, layout.places[part_name(entry, part)] + bytes_before)

    def write_constants() -> int:
        return sum(write(part, tensor, 0) for part, tensor in format.constants(N, K).items())

    def write_rows(rows: slice) -> int:
        written = 0
        for here, block in conversion.rows(entry, source, rows):
            stored = format.quantize(block, conversion.dtype)
            written += sum(write(part, tensor, here.start) for part, tensor in stored.items())
            error.add(block, format.dequantize(stored, K))
        return written

    yield write_constants
    for step in conversion.steps(entry):
        yield lambda step=step: write_rows(step)  # type: ignore[misc]


def _rounded(
    entry: Entry, conversion: Conversion, source: BinaryIO, layout: Layout, output: BinaryIO
) -> Iterator[Piece]:  # fmt: skip
    """The work of writing a tensor in another dtype."""
    dtype = DTYPES[conversion.dtype]
    row_bytes = entry.columns * dtype.itemsize

    def write_rows(rows: slice) -> int:
        written = 0
        for here, block in conversion.rows(entry, source, rows):
            rounded = block.to(dtype)
            if not torch.isfinite(rounded).all():
                raise ValueError(
                    f"{entry.name}: expected merged weights in the range of {dtype}, found {block.abs().max():.3g}"
                )
            written += write_at(rounded, output, layout.places[entry.name] + here.start * row_bytes)
        return written

    for step in conversion.steps(entry):
        yield lambda step=step: write_rows(step)  # type: ignore[misc]
