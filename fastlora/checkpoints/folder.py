"""A folder of model files that is whole or not there, and filled in several goes if need be.

A manifest says what is being written from which inputs, until all of it is; the files that make the folder a model (the
index, then config.json) come last.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..adapters.files import WEIGHTS_FILE, sync
from ..config import CONFIG_FILE
from ..log import logger
from .shards import INDEX_FILE, Shard, published

MANIFEST = ".fastlora-merge.json"
SETTINGS_FILE = "config.json"
# Weights that are not merged, and pickles.
NOT_COPIED = {
    ".safetensors", ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz", ".h5", ".msgpack",
    ".onnx", ".gguf",
}  # fmt: skip


def chosen_device(device: torch.device | str | None) -> torch.device | str:
    """The device, by default a GPU if there is one.

    Raises:
        ValueError: this machine has no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"device: expected one of this machine, found {device!r}: {error}") from None
    return device


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
    hashes = {f"{file.parent.resolve().name}/{file.name}": sha256(file) for file in small}
    return json.dumps({"weights": sizes, "sha256": hashes, **settings}, indent=2, sort_keys=True).encode()


def sha256(file: Path) -> str:
    """The hash of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raises ValueError where a folder to write is one of those to read, or lies in it."""
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"out: expected a new folder outside of {str(folder)!r}, found {str(out)!r}")


def check_space(out: Path, sizes: Mapping[str, int]) -> None:
    """Raises OSError where the disk has no room for files of these names and sizes, as far as they are not there yet.

    What an interrupted run left of a file makes room for it.
    """
    needed = sum(size for name, size in sizes.items() if not (out / name).is_file())
    left = sum(file.stat().st_size for file in out.glob(".*.partial")) if out.is_dir() else 0
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free + left
    if needed > free:
        raise OSError(
            errno.ENOSPC, f"out: expected room for {needed / 1e9:.1f} GB, found {free / 1e9:.1f} GB free", str(out)
        )


def check_out(out: Path, manifest: bytes) -> None:
    """Raises ValueError unless the folder is new, or what an interrupted run of the same inputs left."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"out: expected a new folder, found the file {str(out)!r}")
    links = sorted(file.name for file in out.iterdir() if file.is_symlink())
    if links:
        raise ValueError(f"out: expected a new folder, found a link that leads elsewhere: {links[0]!r} in {str(out)!r}")
    left = {file.name for file in out.iterdir()}
    if MANIFEST in left:
        if (out / MANIFEST).read_bytes() != manifest:
            raise ValueError(f"out: expected an interrupted merge of these inputs, found one of others in {str(out)!r}")
    elif left - {f".{MANIFEST}.partial"}:
        raise ValueError(f"out: expected a new folder, found files in {str(out)!r}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from filling a folder; the lock goes with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: expected a folder of our own, found another process writing {str(folder)!r}"
            ) from None
        except OSError as error:  # some network file systems lock no folders
            logger.warning("%s: could not be locked: %s", folder, error)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def filling(out: Path, manifest: bytes, names: list[str]) -> Iterator[None]:
    """A block that writes the files of a folder, weights of these names first.

    Where it ends with a ValueError, which another go would meet again, what was written is removed.
    """
    if not out.is_dir():
        check_out(out, manifest)
        out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        check_out(out, manifest)
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
    for name in (*names, *(f".{name}.partial" for name in names), MANIFEST):
        (out / name).unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()
