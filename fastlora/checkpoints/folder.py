"""A folder of model files that is whole or not there, and filled in several goes if need be.

A manifest says what is being written from which inputs, until all of it is; the files that make the folder a model (the
index, then config.json) come last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapters.files import WEIGHTS_FILE, sync
from ..config import CONFIG_FILE
from .shards import INDEX_FILE, Shard, published

MANIFEST = ".fastlora-merge.json"
SETTINGS_FILE = "config.json"
# Weights that are not merged, and pickles.
NOT_COPIED = {
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack",
    ".onnx", ".gguf",
}  # fmt: skip


def check_device(device: Any) -> None:
    """Raises ValueError where this machine has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device: expected one of this machine, found {device!r}: {error}") from None


def small_files(base: Path) -> list[Path]:
    """What is copied beside the weights, in the order of writing: the index and config.json last."""
    last = [INDEX_FILE, SETTINGS_FILE]
    files = [
        file for file in base.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.suffix.lower() not in NOT_COPIED
    ]  # fmt: skip
    files = [file for file in files if file.name in last or not file.name.endswith(".index.json")]
    return sorted(files, key=lambda file: (last.index(file.name) if file.name in last else -1, file.name))


def fingerprint(shards: list[Shard], copied: list[Path], adapter: Path, **settings: Any) -> bytes:
    """The text of the manifest: what the inputs are."""
    sizes = {shard.path.name: [shard.size, shard.path.stat().st_mtime_ns] for shard in shards}
    small = [*copied, adapter / WEIGHTS_FILE, adapter / CONFIG_FILE]
    hashes = {f"{file.parent.resolve().name}/{file.name}": _sha256(file) for file in small}
    return json.dumps({"weights": sizes, "sha256": hashes, **settings}, indent=2, sort_keys=True).encode()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_out(out: Path, manifest: bytes) -> None:
    """Raises ValueError unless the folder is new, or what an interrupted run of the same inputs left."""
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


@contextmanager
def filling(out: Path, manifest: bytes, names: list[str]) -> Iterator[None]:
    """A block that writes the files of a folder, weights of these names first.

    Where it ends with a ValueError, which another go would meet again, what was written is removed.
    """
    check_out(out, manifest)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).is_file():
        write_file(out / MANIFEST, manifest)
    try:
        yield
    except ValueError:
        _remove(out, names)
        raise
    (out / MANIFEST).unlink()
    sync(out)


def write_file(file: Path, content: bytes) -> None:
    """Writes a file as a whole."""
    with published(file) as output:
        output.write(content)


def _remove(out: Path, names: list[str]) -> None:
    for name in (*names, MANIFEST):
        (out / name).unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
