"""Merging an adapter into a checkpoint on disk, without ever building the model.

One block of one tensor is in memory at a time, beside the adapter. Every file gets its name once it is whole, those
that make the folder a model (the index, then config.json) come last, and an interrupted merge is taken up again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..adapters.files import WEIGHTS_FILE, read_tensors, sync
from ..config import CONFIG_FILE, LoraConfig
from .changes import Change, find_changes
from .shards import INDEX_FILE, Shard, copy_range, find_shards, published, read_json, write_tensor

MANIFEST = ".fastlora-merge.json"
SETTINGS_FILE = "config.json"
# Weights that are not merged, and pickles.
NOT_COPIED = {
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack",
    ".onnx", ".gguf",
}  # fmt: skip

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
    _check_device(device)
    shards = find_shards(base)
    settings = read_json(base / SETTINGS_FILE) if (base / SETTINGS_FILE).is_file() else {}
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    changes = find_changes(LoraConfig.from_folder(adapter), read_tensors(adapter), entries, settings)
    if not changes:
        raise ValueError(f"{adapter}: expected LoRA weights, found an empty file")
    copied = _small_files(base)
    manifest = _fingerprint(shards, copied, adapter)
    _check_out(out, manifest)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).is_file():
        _write(out / MANIFEST, manifest)
    try:
        _write_shards(shards, changes, out, device or "cpu", progress or (lambda done, total: None))
    except ValueError:
        _remove(out, [shard.path.name for shard in shards])
        raise
    for file in copied:
        _write(out / file.name, file.read_bytes())
    (out / MANIFEST).unlink()
    sync(out)


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device: expected one of this machine, found {device!r}: {error}") from None


def _small_files(base: Path) -> list[Path]:
    """What is copied beside the weights, in the order of writing: the index and config.json last."""
    last = [INDEX_FILE, SETTINGS_FILE]
    files = [
        file for file in base.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.suffix.lower() not in NOT_COPIED
    ]  # fmt: skip
    files = [file for file in files if file.name in last or not file.name.endswith(".index.json")]
    return sorted(files, key=lambda file: (last.index(file.name) if file.name in last else -1, file.name))


def _fingerprint(shards: list[Shard], copied: list[Path], adapter: Path) -> bytes:
    """The text of the manifest: what the inputs are."""
    sizes = {shard.path.name: [shard.size, shard.path.stat().st_mtime_ns] for shard in shards}
    small = [*copied, adapter / WEIGHTS_FILE, adapter / CONFIG_FILE]
    hashes = {f"{file.parent.resolve().name}/{file.name}": _sha256(file) for file in small}
    return json.dumps({"weights": sizes, "sha256": hashes}, indent=2, sort_keys=True).encode()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_out(out: Path, manifest: bytes) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out: expected a new folder, found the file {str(out)!r}")
    left = {file.name for file in out.iterdir()}
    if MANIFEST in left:
        if (out / MANIFEST).read_bytes() != manifest:
            raise ValueError(f"out: expected an interrupted merge of these inputs, found one of others in {str(out)!r}")
    elif left - {f".{MANIFEST}.partial"}:
        raise ValueError(f"out: expected a new folder, found files in {str(out)!r}")


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
        yield from copy_range(source, output, 0, shard.data)
        for entry in shard.entries:
            if entry.name not in changes:
                yield from copy_range(source, output, entry.start, entry.stop)
                continue
            for block in changes[entry.name].blocks(entry, source, device):
                yield write_tensor(output, block)


def _write(file: Path, content: bytes) -> None:
    with published(file) as output:
        output.write(content)


def _remove(out: Path, names: list[str]) -> None:
    """Takes away what a merge that cannot succeed wrote."""
    for name in (*names, MANIFEST):
        (out / name).unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
