"""Merging an adapter into a checkpoint on disk, without ever building the model.

One block of one tensor is in memory at a time, beside the adapter. Every file gets its name once it is whole, and an
interrupted merge is taken up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..adapters.files import read_tensors
from ..config import LoraConfig
from .change import Change
from .changes import find_changes
from .folder import SETTINGS_FILE, check_device, filling, fingerprint, small_files, write_file
from .pieces import Place, write_places
from .shards import Shard, find_shards, published, read_json

Progress = Callable[[int, int], None]


def merge_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str],
    out: str | PathLike[str],
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Folds an adapter into a checkpoint's weights, `W + scale * B A`, and writes a checkpoint of the same files.

    Names, dtypes, order and metadata stay; a sum is rounded once, as `merge` does. An interrupted merge of the same
    inputs goes on where it was. The other small files are copied, pickles and other formats of weights are not.

    Args:
        base: a folder of safetensors files, with or without an index, in bfloat16, float16 or float32.
        adapter: a folder of PEFT's format: LoRA on linear layers, transformers' Conv1D and embeddings, with rsLoRA,
            patterns, DoRA, biases and `modules_to_save`.
        out: a new folder, or what an interrupted merge left.
        device: where to compute, by default the CPU.
        progress: called with the bytes written and their total.

    Raises:
        ValueError: an argument is none of these, or something is not supported (`target_parameters`, trained tokens,
            tied embeddings, quantised weights, initialisations that change the base), and nothing is written; or a
            merged weight is not finite, and what was written is removed.
        OSError: the files cannot be read or written; a call with the same arguments goes on.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    check_device(device)
    shards = find_shards(base)
    settings = read_json(base / SETTINGS_FILE) if (base / SETTINGS_FILE).is_file() else {}
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    changes = find_changes(LoraConfig.from_folder(adapter), read_tensors(adapter), entries, settings)
    if not changes:
        raise ValueError(f"{adapter}: expected LoRA weights, found an empty file")
    copied = small_files(base)
    with filling(out, fingerprint(shards, copied, adapter), [shard.path.name for shard in shards]):
        _write_shards(shards, changes, out, device or "cpu", progress or (lambda done, total: None))
        for file in copied:
            write_file(out / file.name, file.read_bytes())


def _write_shards(
    shards: list[Shard], changes: dict[str, Change], out: Path, device: Any, progress: Progress
) -> None:  # fmt: skip
    done, total = 0, sum(shard.size for shard in shards)
    for shard in shards:
        before = done
        if not (out / shard.path.name).is_file():
            for written in _write_shard(shard, changes, out / shard.path.name, device):
                done += written
                progress(done, total)
        done = before + shard.size
        progress(done, total)


def _write_shard(shard: Shard, changes: dict[str, Change], target: Path, device: Any) -> Iterator[int]:
    """Writes one file, and yields the bytes of every piece."""
    with shard.path.open("rb") as source, published(target) as output:
        output.write(source.read(shard.data))
        output.flush()
        places = [Place(entry, entry.start, changes.get(entry.name)) for entry in shard.entries]
        yield from write_places(output, places, device)
