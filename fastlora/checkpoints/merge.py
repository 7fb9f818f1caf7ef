"""Merging adapters into a checkpoint on disk, without ever building the model.

A few MB of a tensor are in memory at a time, beside the adapters. Every file gets its name once it is whole, and an
interrupted merge is taken up again.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .folder import check_apart, check_space, chosen_device, filling, write_file
from .inputs import AnyAdapters, AnyPath, by_folder, read_inputs
from .pieces import Progress, write_files, write_places
from .plan import NewFile, plan_small_files, plan_weights


def merge_checkpoint(
    base: AnyPath,
    adapter: AnyAdapters,
    out: AnyPath,
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Folds adapters into a checkpoint's weights, `W + sum of weight * scale * B A`, and writes one of the same files.

    Names, dtypes, order and metadata stay; a sum is formed in float64 and rounded once, as `merge` does it. Int8
    weights are int8 again. An adapter on one of two tied embeddings makes two tensors of them, as `merge` does: an
    output head is added and `tie_word_embeddings` becomes false. An interrupted merge of the same inputs goes on where
    it was. The other small files are copied, pickles and other formats of weights are not.

    Memory: the adapters and some 20 MB per core, up to eight cores; with DoRA on an embedding or a Conv1D, a few times
    that tensor.

    Args:
        base: a folder of safetensors files, with or without an index, in bfloat16, float16, float32 or bitsandbytes'
            8-bit format.
        adapter: a folder of PEFT's format: LoRA on linear layers, transformers' Conv1D, convolutions, embeddings and
            experts (`target_parameters`), with rsLoRA, patterns, DoRA, biases, `modules_to_save` and trained tokens.
            Or several of them, by path with the factors of their low-rank parts.
        out: a new folder, or what an interrupted merge left.
        device: where to compute, by default a GPU if there is one.
        progress: called with the bytes written and their total.

    Raises:
        ValueError: an argument is none of these, or something is not supported (`layer_replication`, 4-bit weights,
            initialisations that change the base), or another process is writing `out`, and nothing is written; or a
            merged weight is not finite, and what was written is removed.
        OSError: the files cannot be read or written, or there is no room; a call with the same arguments goes on.
    """
    base, out = Path(base), Path(out)
    folders = by_folder(adapter)
    device = chosen_device(device)
    check_apart(out, [base, *folders])
    inputs = read_inputs(base, folders)
    files = plan_weights(inputs.shards, inputs.changes, inputs.new)
    sizes, by_name = {file.name: file.size for file in files}, {file.name: file for file in files}
    check_space(out, sizes)
    with filling(out, inputs.manifest(), list(sizes)):
        write_files(out, sizes, lambda name, output: _write(by_name[name], output, device), progress or _silent)
        for name, content in plan_small_files(base, inputs.new, inputs.untied).items():
            write_file(out / name, content)


def _write(file: NewFile, output: BinaryIO, device: Any) -> Iterator[int]:
    """Writes one file, and yields the bytes of every piece."""
    output.write(file.header)
    output.flush()
    yield from write_places(output, file.places, device)


def _silent(done: int, total: int) -> None:
    """For those who want to see no progress."""
