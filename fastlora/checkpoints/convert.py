"""Writing a merged checkpoint in other dtypes: 16-bit, or linear layers in int8, quantised once from float32.

Some rows of a tensor are in memory at a time, but for weights that are stored transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .change import Change
from .int8 import Int8Format, Specs
from .layout import Layout, lay_out
from .linears import Linears
from .pieces import Piece, Place, computing_on, pieces_of, run, write_at
from .report import Difference, LayerError
from .shards import DTYPES, Entry

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


def write_tensors(
    entries: list[Entry], conversion: Conversion, output: BinaryIO, errors: list[LayerError]
) -> Iterator[int]:  # fmt: skip
    """Writes one file, yields the bytes of every piece, and notes the errors of its int8 weights.

    Args:
        entries: tensors of one file of the base.
    """
    layout = lay_out(specs_of(entries, conversion))
    output.write(layout.header)
    output.flush()
    yield len(layout.header)
    with entries[0].path.open("rb") as source:
        writer = _Writer(conversion, layout, source, output)
        yield from run([piece for entry in entries for piece in writer.pieces(entry)])
    errors += [LayerError(name, difference.relative_rms) for name, difference in writer.differences.items()]


class _Writer:
    """The work of writing one file, as pieces that threads do in any order.

    Attributes:
        differences: of the int8 weights from the merged ones, by name.
    """

    def __init__(self, conversion: Conversion, layout: Layout, source: BinaryIO, output: BinaryIO) -> None:
        self.conversion, self.layout, self.source, self.output = conversion, layout, source, output
        self.computing = computing_on(conversion.device)
        self.differences: dict[str, Difference] = {}

    def pieces(self, entry: Entry) -> Iterator[Piece]:
        conversion = self.conversion
        if conversion.is_int8(entry):
            self.differences[entry.name] = Difference()
            yield partial(self._write_constants, entry)
            yield from (partial(self._write_int8, entry, rows) for rows in conversion.steps(entry))
        elif conversion.specs(entry)[entry.name][0] != entry.dtype:
            yield from (partial(self._write_rounded, entry, rows) for rows in conversion.steps(entry))
        else:
            place = Place(entry, self.layout.places[entry.name], conversion.changes.get(entry.name))
            yield from pieces_of(place, self.source, self.output, conversion.device, self.computing)

    def _write_constants(self, entry: Entry) -> int:
        assert self.conversion.format is not None, "there are no int8 weights without one"
        constants = self.conversion.format.constants(*self.conversion.shape(entry))
        return sum(self._write(part_name(entry, part), tensor, 0) for part, tensor in constants.items())

    def _write_int8(self, entry: Entry, rows: slice) -> int:
        format, dtype = self.conversion.format, self.conversion.dtype
        assert format is not None, "there are no int8 weights without one"
        made: list[tuple[str, Tensor, int]] = []
        with self.computing:
            for here, block in self.conversion.rows(entry, self.source, rows):
                stored = format.quantize(block, dtype)
                self.differences[entry.name].add(block, format.dequantize(stored, block.shape[1]))
                made += [(part_name(entry, part), tensor.cpu(), here.start) for part, tensor in stored.items()]
        return sum(self._write(name, tensor, row) for name, tensor, row in made)

    def _write_rounded(self, entry: Entry, rows: slice) -> int:
        dtype = DTYPES[self.conversion.dtype]
        made: list[tuple[Tensor, int]] = []
        with self.computing:
            for here, block in self.conversion.rows(entry, self.source, rows):
                rounded = block.to(dtype)
                if not torch.isfinite(rounded).all():
                    raise ValueError(
                        f"{entry.name}: expected merged weights in the range of {dtype}, found {block.abs().max():.3g}"
                    )
                made.append((rounded.cpu(), here.start))
        return sum(self._write(entry.name, tensor, row) for tensor, row in made)

    def _write(self, name: str, tensor: Tensor, row: int) -> int:
        """Writes rows of a tensor of the new file, from this one on."""
        before = row * (tensor.nbytes // len(tensor)) if row else 0
        return write_at(tensor, self.output, self.layout.places[name] + before)
