"""Whether a merged checkpoint is its base with its adapter: every tensor, a block of rows at a time.

A tensor that the adapter leaves alone has the base's very bytes. A merged one may be off by what rounding explains,

    |found - exact|  <=  u |exact| + (2 u + R 2^-24) |scale| ||b_n|| ||a_k||

with u half the epsilon of the file's dtype: the sum is rounded once, and the product B A, of R terms summed in float32,
is rounded, scaled and rounded again. (DoRA's norm, quotient and product are three roundings more of the sum.) An int8
weight may be off by half the distance of two codes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .change import AbsmaxChange, Change
from .convert import Conversion
from .folder import chosen_device
from .inputs import AnyAdapters, AnyPath, by_folder, read_inputs, read_settings
from .int8 import FLOAT32_UNIT, format_of
from .linears import Linears, find_linears
from .pieces import Progress
from .report import Comparison, TensorCheck, Verification
from .shards import DTYPES, Entry, find_shards, same_bytes
from .stored import Files, Stored, find_stored

UPDATE_ROUNDINGS = 2
DORA_ROUNDINGS = 4


def verify_checkpoint(
    base: AnyPath,
    adapter: AnyAdapters,
    merged: AnyPath,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Checks every tensor of a merged checkpoint, dense or int8, against its base and adapter.

    Only safetensors and JSON are read, a block of one tensor at a time. Merges of other tools pass where they round
    no more often than the formula above; int8 weights have to be quantised from the merge in float32.

    Args:
        base, adapter: as in `merge_checkpoint`.
        merged: a folder that `merge_checkpoint`, `export_checkpoint` or another tool wrote.
        device: where to compute, by default a GPU if there is one.
        progress: called with the bytes of the base that are compared and their total.

    Raises:
        ValueError: a folder is not what it should be, or its format is unknown. A wrong tensor raises nothing.
    """
    base, merged = Path(base), Path(merged)
    device = chosen_device(device)
    inputs = read_inputs(base, by_folder(adapter))
    files, format = Files(find_shards(merged)), format_of(read_settings(merged))
    linears = Linears({}, [])
    if format is not None and format.conv1d and format_of(inputs.settings) is None:
        # Such weights are stored the other way round.
        linears = find_linears(inputs.settings, inputs.shards, format)
    conversion = Conversion(inputs.changes, "", "", format, linears, device)
    entries = [(shard, entry) for shard in inputs.shards for entry in inputs.entries(shard)]
    done, total = 0, sum(entry.stop - entry.start for _, entry in entries)
    checks: list[TensorCheck] = []
    for shard, entry in entries:
        if not isinstance(inputs.changes.get(entry.name), AbsmaxChange):  # which is a part of the weight's check
            with shard.path.open("rb") as source:
                checks.append(_check(entry, source, conversion, files))
        done += entry.stop - entry.start
        if progress is not None:
            progress(done, total)
    extra = files.places.keys() - files.used
    checks += [TensorCheck(name, "extra", problem="expected no such tensor") for name in sorted(extra)]
    return Verification("dense" if format is None else format.name, tuple(checks))


def _check(entry: Entry, source: BinaryIO, conversion: Conversion, files: Files) -> TensorCheck:
    same = entry.dtype == "I8" and entry.name not in conversion.changes
    stored = None if same else find_stored(entry, conversion, files)
    if stored is not None:
        return _check_int8(entry, source, conversion, stored)
    place = files.find(entry.name)
    if place is None:
        return TensorCheck(entry.name, "copied", problem="expected it, found none")
    path, found = place
    changed = entry.name in conversion.changes
    kind = "merged" if changed else "copied" if found.dtype == entry.dtype else "rounded"
    if found.shape != entry.shape or (kind != "copied" and not {found.dtype, entry.dtype} <= DTYPES.keys()):
        expected = f"expected {entry.dtype} {list(entry.shape)}, found {found.dtype} {list(found.shape)}"
        return TensorCheck(entry.name, kind, problem=expected)
    with path.open("rb") as file:
        if kind == "copied" and same_bytes(source, entry, file, found):
            return TensorCheck(entry.name, kind)
        if entry.dtype not in DTYPES or not entry.shape:
            return TensorCheck(entry.name, kind, problem="expected the base's bytes, found others")
        return _check_dense(entry, source, conversion, file, found, kind)


def _check_dense(
    entry: Entry, source: BinaryIO, conversion: Conversion, file: BinaryIO, found: Entry, kind: str
) -> TensorCheck:  # fmt: skip
    change = conversion.changes.get(entry.name, Change())
    limits = torch.finfo(DTYPES[found.dtype])
    comparison = Comparison()
    for rows, expected in conversion.merged(entry, source):
        actual = found.read(file, rows).to(expected.device).float()
        bound = _bound(change, rows, expected, limits.eps / 2) + limits.tiny * limits.eps / 2
        comparison.add_bounded(expected, actual, bound)
    check = comparison.result(entry.name, kind)
    return check if kind != "copied" else replace(check, problem="expected the base's bytes, found others")


def _bound(change: Change, rows: slice, expected: Tensor, unit: float) -> Tensor:
    """What rounding explains in rows of a dense tensor."""
    roundings = DORA_ROUNDINGS if any(term.magnitude is not None for term in change.terms) else 1
    bound = (unit * roundings + FLOAT32_UNIT) * expected.abs()
    for added in change.added:
        bound = bound + unit * added[rows].abs().to(bound.device)
    for term in change.terms:
        of_inputs, of_outputs = term.a.float().norm(dim=-2), term.b.float().norm(dim=-1)
        left, right = (of_inputs, of_outputs) if change.transposed else (of_outputs, of_inputs)
        factor = abs(term.scale) * (UPDATE_ROUNDINGS * unit + term.a.shape[-2] * FLOAT32_UNIT)
        left, right = left[rows], right[rows] if right.dim() == 2 else right  # experts have norms of their own
        products = left[..., :, None] * right[..., None, :]
        bound = bound + (factor * products).to(bound.device).view(bound.shape)
    return bound


def _check_int8(entry: Entry, source: BinaryIO, conversion: Conversion, stored: Stored) -> TensorCheck:
    problem = stored.problem()
    if problem is not None:
        return TensorCheck(entry.name, "int8", problem=problem)
    comparison = Comparison()
    for expected, actual in stored.beside(conversion.merged(entry, source)):
        comparison.add_bounded(expected, actual, stored.format.bound(expected, stored.scale_dtype))
    return comparison.result(entry.name, "int8")
