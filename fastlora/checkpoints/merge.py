"""Merging adapters into a checkpoint on disk, without ever building the model.

A few MB of a tensor are in memory at a time, beside the adapters. Every file gets its name once it is whole, and an
interrupted merge is taken up again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from os import PathLike, fspath
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..adapters.files import WEIGHTS_FILE, read_tensors
from ..config import CONFIG_FILE, LoraConfig
from ..log import logger
from .changes import Adapter, find_all_changes
from .ends import find_ends
from .folder import (
    SETTINGS_FILE,
    check_apart,
    check_device,
    check_space,
    filling,
    fingerprint,
    sha256,
    small_files,
    write_file,
)
from .pieces import write_places
from .plan import NewFile, plan_small_files, plan_weights
from .shards import Shard, find_shards, published, read_json

AnyPath = str | PathLike[str]
Progress = Callable[[int, int], None]


def merge_checkpoint(
    base: AnyPath,
    adapter: AnyPath | Sequence[AnyPath] | Mapping[AnyPath, float],
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
    folders = _by_folder(adapter)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_apart(out, [base, *folders])
    shards = find_shards(base)
    settings = read_json(base / SETTINGS_FILE) if (base / SETTINGS_FILE).is_file() else {}
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    adapters = [_read(folder, weight, base, settings) for folder, weight in folders.items()]
    changes, untied = find_all_changes(adapters, entries, settings)
    ends = find_ends(entries, settings)
    new = {name: entries[ends.embedding] for name in changes if name not in entries} if untied and ends else {}
    files = plan_weights(shards, changes, new)
    sizes = {file.name: file.size for file in files}
    check_space(out, sizes)
    with filling(out, _manifest(shards, base, folders), list(sizes)):
        _write_files(files, out, device, progress or (lambda done, total: None))
        for name, content in plan_small_files(base, new, untied).items():
            write_file(out / name, content)


def _by_folder(adapter: Any) -> dict[Path, float]:
    """The weights of adapters by folder.

    Raises:
        TypeError, ValueError: there are none, one stands twice, or a weight is no finite number.
    """
    if isinstance(adapter, str | PathLike):
        adapter = [adapter]
    if not isinstance(adapter, Mapping):
        paths = [Path(path) for path in adapter]
        if twice := [str(path) for path in paths if paths.count(path) > 1]:
            raise ValueError(f"adapter: expected different folders, found {twice[0]!r} twice")
        adapter = dict.fromkeys(paths, 1.0)
    if not adapter:
        raise ValueError("adapter: expected at least one folder, found none")
    for path, weight in adapter.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise TypeError(f"adapter: expected a number as the weight of {fspath(path)!r}, found {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"adapter: expected a finite weight of {fspath(path)!r}, found {weight!r}")
    return {Path(path): weight for path, weight in adapter.items()}


def _read(folder: Path, weight: float, base: Path, settings: dict[str, Any]) -> Adapter:
    adapter = Adapter(LoraConfig.from_folder(folder), read_tensors(folder), weight)
    if not adapter.tensors:
        raise ValueError(f"{folder}: expected LoRA weights, found an empty file")
    _warn_of_another_base(adapter.config.base_model_name_or_path, base, settings, folder)
    return adapter


def _warn_of_another_base(wanted: str | None, base: Path, settings: dict[str, Any], folder: Path) -> None:
    """All shapes may fit, so that the name may just be another path to the same model: this is no error."""
    if not wanted:
        return
    # The hub's cache has models--owner--name/snapshots/<commit>.
    parts = [*base.resolve().parts, *Path(str(settings.get("_name_or_path", ""))).parts]
    if not any(part == Path(wanted).name or part.endswith(f"--{Path(wanted).name}") for part in parts):
        logger.warning("%s: the adapter was made for %r, and is merged into %r", folder, wanted, str(base))


def _manifest(shards: list[Shard], base: Path, folders: dict[Path, float]) -> bytes:
    """What the inputs are, in a text: the files of the first adapter by name, the others by their order."""
    first, *others = folders
    hashes = [[sha256(folder / name) for name in (WEIGHTS_FILE, CONFIG_FILE)] for folder in others]
    more = {"others": hashes, "factors": list(folders.values())} if others or folders[first] != 1 else {}
    return fingerprint(shards, small_files(base), first, **more)


def _write_files(files: list[NewFile], out: Path, device: Any, progress: Progress) -> None:
    done, total = 0, sum(file.size for file in files)
    # One file is synced while the next one is computed.
    with ThreadPoolExecutor(1) as publisher:
        before: Future[None] | None = None
        for file in files:
            end = done + file.size
            if not (out / file.name).is_file():
                with ExitStack() as stack:
                    for written in _write_file(file, stack.enter_context(published(out / file.name)), device):
                        done += written
                        progress(done, total)
                    if before is not None:
                        before.result()
                    before = publisher.submit(stack.pop_all().close)
            done = end
            progress(done, total)
        if before is not None:
            before.result()


def _write_file(file: NewFile, output: BinaryIO, device: Any) -> Iterator[int]:
    """Writes one file, and yields the bytes of every piece."""
    output.write(file.header)
    output.flush()
    yield from write_places(output, file.places, device)
