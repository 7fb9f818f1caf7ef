"""A base and an adapter as what servers and other tools load: an adapter, a dense model, or an int8 one."""

from __future__ import annotations

import json
from collections import Counter
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..adapters.files import read_tensors
from ..config import LoraConfig
from .changes import find_changes
from .convert import Conversion, write_shard
from .folder import SETTINGS_FILE, check_device, filling, fingerprint, small_files, write_file
from .int8 import INT8_FORMATS, Specs
from .layout import index_of, lay_out
from .linears import Linears, find_linears
from .merge import Progress
from .perplexity import check_text, perplexities
from .portable import export_adapter
from .report import ExportReport, LayerError
from .shards import DTYPES, INDEX_FILE, Shard, find_shards, read_json
from .stored import layer_errors

ADAPTERS = ("peft", "portable")
DENSE = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
FORMATS = (*ADAPTERS, *DENSE, *INT8_FORMATS)


def export_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    to: str = "int8",
    text: str | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a base and an adapter in a format that servers load, a tensor at a time.

    | to | what is written | who reads it |
    |---|---|---|
    | `"peft"` | the adapter, checked against the base | PEFT |
    | `"portable"` | the adapter with one rank and a scale of 1 everywhere | PEFT, vLLM, llama.cpp |
    | `"bf16"`, `"fp16"`, `"fp32"` | the merged model in this dtype | everything |
    | `"int8"` | the merged model in int8, compressed-tensors pack-quantized (W8A16) | transformers, vLLM |
    | `"w8a8"` | the same, int-quantized, activations quantised per token by the server | transformers, vLLM |
    | `"bnb8"` | the merged model as bitsandbytes stores LLM.int8 | transformers |

    A portable adapter has its scales folded into B, rows of zeros up to the largest rank, and a product for each of the
    projections that the base has apart where the adapter's model had them as one.

    Int8 weights are those of linear layers, but for output heads, routers and layers that the model keeps in float32.
    They are quantised once, from the merge in float32, with a scale per output feature. Names of files, their order
    and what lies beside them stay; an interrupted export of the same inputs goes on where it was.

    Args:
        base: a folder of safetensors files in bfloat16, float16 or float32.
        adapter: a folder of PEFT's format, as in `merge_checkpoint`.
        out: a new folder, or what an interrupted export left.
        to: the format.
        text: a text to measure perplexity on, with the merged model and the exported one, which are loaded one after
            the other for that; for merged formats.
        device: where to compute, by default the CPU.
        progress: called with the bytes written and their total.

    Returns:
        The format, the bytes written, the relative RMS error of each int8 weight, and the perplexities.

    Raises:
        ValueError: an argument is none of these, or the format cannot express the adapter or the base, and nothing is
            written; or a merged weight is not finite, and what was written is removed.
        OSError: the files cannot be read or written; a call with the same arguments goes on.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {FORMATS}, found {to!r}")
    base, adapter, out = Path(base), Path(adapter), Path(out)
    check_device(device)
    settings = read_json(base / SETTINGS_FILE) if (base / SETTINGS_FILE).is_file() else {}
    if text is not None:
        check_text(base, text, to)
    if to in ADAPTERS:
        return export_adapter(base, adapter, out, portable=to == "portable")
    shards = find_shards(base)
    conversion = _conversion(shards, adapter, settings, to, device or "cpu")
    report = _write(shards, conversion, settings, adapter, out, to, progress or (lambda done, total: None))
    return report if text is None else perplexities(report, base, adapter, out, text, device or "cpu")


def _conversion(
    shards: list[Shard], adapter: Path, settings: dict[str, Any], to: str, device: Any
) -> Conversion:  # fmt: skip
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    changes = find_changes(LoraConfig.from_folder(adapter), read_tensors(adapter), entries, settings)
    if not changes:
        raise ValueError(f"{adapter}: expected LoRA weights, found an empty file")
    main = main_dtype(shards)
    if to in DENSE:
        return Conversion(changes, main, DENSE[to], None, Linears({}, []), device)
    format = INT8_FORMATS[to]
    return Conversion(changes, main, main, format, find_linears(settings, entries, format), device)


def main_dtype(shards: list[Shard]) -> str:
    """The float dtype that most bytes of a checkpoint have."""
    sizes: Counter[str] = Counter()
    for shard in shards:
        for entry in shard.entries:
            sizes[entry.dtype] += (entry.stop - entry.start) * (entry.dtype in DTYPES)
    main, size = sizes.most_common(1)[0]
    if not size:
        raise ValueError(f"base: expected weights in one of {list(DTYPES)}, found {sorted(sizes)}")
    return main


def _write(
    shards: list[Shard], conversion: Conversion, settings: dict[str, Any], adapter: Path, out: Path, to: str,
    progress: Progress,
) -> ExportReport:  # fmt: skip
    base = shards[0].path.parent
    files = {shard.path.name: _specs(shard, conversion) for shard in shards}
    written = index_of(files, shards) | {SETTINGS_FILE: _settings(settings, conversion)}
    copied = [file for file in small_files(base) if file.name not in (INDEX_FILE, SETTINGS_FILE)]
    errors: list[LayerError] = []
    sizes = {name: lay_out(specs).size for name, specs in files.items()}
    done, total = 0, sum(sizes.values())
    with filling(out, fingerprint(shards, small_files(base), adapter, to=to), list(files)):
        for shard in shards:
            target = out / shard.path.name
            if target.is_file():
                errors += layer_errors(shard, conversion, target)
            else:
                for reached in accumulate(write_shard(shard, conversion, target, errors), initial=done):
                    progress(reached, total)
            done += sizes[target.name]
            progress(done, total)
        for file in copied:
            write_file(out / file.name, file.read_bytes())
        for name, content in written.items():
            write_file(out / name, content)
    return ExportReport(to, total, tuple(errors))


def _specs(shard: Shard, conversion: Conversion) -> Specs:
    return {name: spec for entry in shard.entries for name, spec in conversion.specs(entry).items()}


def _settings(settings: dict[str, Any], conversion: Conversion) -> bytes:
    """The text of config.json."""
    values = dict(settings)
    if conversion.format is not None:
        values["quantization_config"] = conversion.format.settings(conversion.linears.dense)
    elif conversion.dtype != conversion.main:
        values |= _with_dtype(values, str(DTYPES[conversion.dtype]).removeprefix("torch."))
    return (json.dumps(values, indent=2) + "\n").encode()


def _with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The settings of a model, and of its parts, with another dtype."""
    changed = {name: _with_dtype(value, dtype) if isinstance(value, dict) else value for name, value in values.items()}
    return changed | {name: dtype for name in ("dtype", "torch_dtype") if name in values}
