"""A base and an adapter as what servers and other tools load: an adapter, a dense model, or an int8 one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .convert import Conversion, specs_of, write_tensors
from .folder import SETTINGS_FILE, check_apart, check_space, chosen_device, filling, write_file
from .inputs import AnyAdapters, AnyPath, Inputs, by_folder, read_inputs
from .int8 import INT8_FORMATS, Specs
from .layout import index_of, lay_out
from .linears import Linears, find_linears
from .perplexity import check_text, perplexities
from .pieces import Progress, write_files
from .plan import plan_small_files
from .portable import export_adapter
from .report import ExportReport, LayerError
from .shards import DTYPES, INDEX_FILE, Shard
from .stored import layer_errors

ADAPTERS = ("peft", "portable")
DENSE = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
FORMATS = (*ADAPTERS, *DENSE, *INT8_FORMATS)


def export_checkpoint(
    base: AnyPath,
    adapter: AnyAdapters,
    out: AnyPath,
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
        adapter: a folder of PEFT's format, or several, as in `merge_checkpoint`; one alone to export as an adapter.
        out: a new folder, or what an interrupted export left.
        to: the format.
        text: a text to measure perplexity on, with the merged model and the exported one, which are loaded one after
            the other for that; for merged formats.
        device: where to compute, by default a GPU if there is one.
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
    base, out, folders = Path(base), Path(out), by_folder(adapter)
    device = chosen_device(device)
    check_apart(out, [base, *folders])
    if text is not None:
        check_text(base, text, to)
    if to in ADAPTERS:
        if list(folders.values()) != [1.0]:
            raise ValueError(f"adapter: expected one of weight 1 for {to!r}, found {len(folders)}; see `combine`")
        return export_adapter(base, next(iter(folders)), out, portable=to == "portable")
    inputs = read_inputs(base, folders)
    report = _write(inputs, _conversion(inputs, to, device), out, to, progress or (lambda done, total: None))
    return report if text is None else perplexities(report, base, folders, out, text, device)


def _conversion(inputs: Inputs, to: str, device: Any) -> Conversion:
    if inputs.settings.get("quantization_config"):
        raise ValueError(
            f"base: expected dense weights for {to!r}, found a quantization_config in config.json; `merge` merges into "
            "int8 weights"
        )
    main = main_dtype(inputs.shards)
    if to in DENSE:
        return Conversion(inputs.changes, main, DENSE[to], None, Linears({}, []), device)
    linears = find_linears(inputs.settings, inputs.shards, INT8_FORMATS[to])
    return Conversion(inputs.changes, main, main, INT8_FORMATS[to], linears, device)


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


def _write(inputs: Inputs, conversion: Conversion, out: Path, to: str, progress: Progress) -> ExportReport:
    entries = {shard.path.name: inputs.entries(shard) for shard in inputs.shards}
    files = {name: specs_of(tensors, conversion) for name, tensors in entries.items()}
    sizes = {name: lay_out(specs).size for name, specs in files.items()}
    check_space(out, sizes)
    errors: dict[str, list[LayerError]] = {name: [] for name in files}

    def write(name: str, output: BinaryIO) -> Iterator[int]:
        return write_tensors(entries[name], conversion, output, errors[name])

    with filling(out, inputs.manifest(to=to), list(files)):
        for name in files:
            if (out / name).is_file():
                errors[name] += layer_errors(entries[name], conversion, out / name)
        write_files(out, sizes, write, progress)
        for name, content in _small_files(inputs, conversion, files).items():
            write_file(out / name, content)
    return ExportReport(to, sum(sizes.values()), tuple(error for found in errors.values() for error in found))


def _small_files(inputs: Inputs, conversion: Conversion, files: dict[str, Specs]) -> dict[str, bytes]:
    """The other files by name, in the order of writing: those of a merge, with the index and config of an export."""
    contents = plan_small_files(inputs.base, inputs.new, inputs.untied)
    if INDEX_FILE in contents:
        tensors = [entry for shard in inputs.shards for entry in inputs.entries(shard)]
        contents[INDEX_FILE] = index_of(files, sum(math.prod(entry.shape) for entry in tensors))
    if SETTINGS_FILE in contents:
        contents[SETTINGS_FILE] = _settings(json.loads(contents[SETTINGS_FILE]), conversion)
    return contents


def _settings(settings: dict[str, Any], conversion: Conversion) -> bytes:
    """The text of config.json."""
    values = dict(settings)
    if conversion.format is not None:
        values["quantization_config"] = conversion.format.settings(conversion.linears.dense)
    elif conversion.dtype != conversion.main:
        values |= _with_dtype(values, str(DTYPES[conversion.dtype]).removeprefix("torch."))
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _with_dtype(values: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The settings of a model, and of its parts, with another dtype."""
    changed = {name: _with_dtype(value, dtype) if isinstance(value, dict) else value for name, value in values.items()}
    return changed | {name: dtype for name in ("dtype", "torch_dtype") if name in values}
