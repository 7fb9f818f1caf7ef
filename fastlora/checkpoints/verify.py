"""Whether a merged checkpoint is its base with its adapter: every tensor, a block of rows at a time.

A tensor that the adapter leaves alone has the base's very bytes. A merged one may be off by what rounding explains,

    |found - exact|  <=  u |exact| + (2 u + R 2^-24) |scale| ||b_n|| ||a_k||

with u half the epsilon of the file's dtype: the sum is rounded once, and the product B A, of R terms summed in float32,
is rounded, scaled and rounded again. (DoRA's norm, quotient and product are three roundings more of the sum.) An int8
weight may be off by half the distance of two codes.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..adapters.files import read_tensors
from ..config import LoraConfig
from .changes import Change, find_changes
from .convert import Conversion
from .folder import SETTINGS_FILE, check_device
from .int8 import FLOAT32_UNIT, format_of
from .linears import Linears, find_linears
from .merge import Progress
from .report import Comparison, TensorCheck, Verification
from .shards import DTYPES, Entry, find_shards, read_json, same_bytes
from .stored import Files, Stored, find_stored

UPDATE_ROUNDINGS = 2
DORA_ROUNDINGS = 4


def verify_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    merged: str | PathLike[str],
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
        device: where to compute, by default the CPU.
        progress: called with the bytes of the base that are compared and their total.

    Raises:
        ValueError: a folder is not what it should be, or its format is unknown. A wrong tensor raises nothing.
    """
    base, adapter, merged = Path(base), Path(adapter), Path(merged)
    check_device(device)
    shards, found = find_shards(base), find_shards(merged)
    settings, merged_settings = _settings(base), _settings(merged)
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    changes = find_changes(LoraConfig.from_folder(adapter), read_tensors(adapter), entries, settings)
    format = format_of(merged_settings)
    linears = Linears({}, [])
    if format is not None and format.conv1d:  # such weights are stored the other way round
        linears = find_linears(settings, entries, format)
    conversion = Conversion(changes, "", "", format, linears, device or "cpu")
    files = Files(found)
    done, total = 0, sum(shard.size for shard in shards)
    checks: list[TensorCheck] = []
    for shard in shards:
        with shard.path.open("rb") as source:
            for entry in shard.entries:
                checks.append(_check(entry, source, conversion, files))
                done += entry.stop - entry.start
                if progress is not None:
                    progress(done, total)
    extra = files.places.keys() - files.used
    checks += [TensorCheck(name, "extra", problem="expected no such tensor") for name in sorted(extra)]
    return Verification("dense" if format is None else format.name, tuple(checks))


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}


def _check(entry: Entry, source: BinaryIO, conversion: Conversion, files: Files) -> TensorCheck:
    stored = find_stored(entry, conversion, files)
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
    unit = 0.0 if kind == "copied" else limits.eps / 2
    comparison = Comparison()
    start = 0
    for expected in conversion.merged(entry, source):
        rows = slice(start, start + len(expected))
        actual = found.read(file, rows).to(expected.device).float()
        bound = _bound(change, rows, expected, unit) + (limits.tiny * limits.eps / 2 if unit else 0.0)
        comparison.add_bounded(expected, actual, bound)
        start = rows.stop
    return comparison.result(entry.name, kind)


def _bound(change: Change, rows: slice, expected: Tensor, unit: float) -> Tensor:
    """What rounding explains in rows of a dense tensor."""
    if not unit:
        return torch.zeros_like(expected)
    bound = (unit * (1 if change.magnitude is None else DORA_ROUNDINGS) + FLOAT32_UNIT) * expected.abs()
    if change.added is not None:
        return bound + unit * change.added[rows].abs().to(bound.device)
    if change.a is None or change.b is None:
        return bound
    of_inputs, of_outputs = change.a.norm(dim=0), change.b.norm(dim=1)
    left, right = (of_inputs, of_outputs) if change.transposed else (of_outputs, of_inputs)
    factor = abs(change.scale) * (UPDATE_ROUNDINGS * unit + change.a.shape[0] * FLOAT32_UNIT)
    return bound + (factor * left[rows, None] * right).to(bound.device)


def _check_int8(entry: Entry, source: BinaryIO, conversion: Conversion, stored: Stored) -> TensorCheck:
    problem = stored.problem()
    if problem is not None:
        return TensorCheck(entry.name, "int8", problem=problem)
    comparison = Comparison()
    for expected, actual in stored.beside(conversion.merged(entry, source)):
        comparison.add_bounded(expected, actual, stored.format.bound(expected, stored.scale_dtype))
    return comparison.result(entry.name, "int8")
