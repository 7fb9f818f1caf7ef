"""Writing a file of tensors by several threads, each a piece at its place.

Merging is bounded by the disk once nothing waits for anything else: a thread per core reads, computes and writes a few
MB at a time, and the system is told to begin writing them at once instead of when the file is synced.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .change import AbsmaxChange, Change
from .shards import Entry, fill, published

CHUNK = 1 << 23  # bytes copied at once
WRITE = 1 << 20  # bytes of a call; for twice as many the system looks for such large pages that it takes twice as long
MOST_WORKERS = 8  # each of which holds a block of a tensor or two
# What copy_file_range says where it does not work between two files.
NOT_HERE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}

Piece = Callable[[], int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the base goes in a new file, as it is or changed."""

    entry: Entry
    start: int
    change: Change | None


def write_files(
    out: Path, sizes: Mapping[str, int], write: Callable[[str, BinaryIO], Iterator[int]], progress: Progress
) -> None:  # fmt: skip
    """Writes the files of a folder that are not there yet.

    Args:
        sizes: of the files, in bytes, by name.
        write: writes the file of a name, and yields the bytes of every piece.
        progress: called with the bytes written and their total.
    """
    done, total = 0, sum(sizes.values())
    # One file is synced while the next one is computed.
    with ThreadPoolExecutor(1) as publisher:
        before: Future[None] | None = None
        for name, size in sizes.items():
            end = done + size
            if not (out / name).is_file():
                with ExitStack() as stack:
                    for written in write(name, stack.enter_context(published(out / name))):
                        done += written
                        progress(done, total)
                    if before is not None:
                        before.result()
                    before = publisher.submit(stack.pop_all().close)
            done = end
            progress(done, total)
        if before is not None:
            before.result()


def write_places(output: BinaryIO, places: Iterable[Place], device: Any) -> Iterator[int]:
    """Writes tensors at their places in a file, in any order, and yields the bytes of every piece."""
    with ExitStack() as stack:
        opened: dict[Any, BinaryIO] = {}
        pieces: list[Piece] = []
        computing = computing_on(device)
        # The absmax of int8 rows comes from merging them.
        for place in sorted(places, key=lambda place: isinstance(place.change, AbsmaxChange)):
            path = place.entry.path
            if path not in opened:
                opened[path] = stack.enter_context(path.open("rb"))
            pieces += pieces_of(place, opened[path], output, device, computing)
        yield from run(pieces)


def computing_on(device: Any) -> AbstractContextManager[Any]:
    """What a piece enters to compute. On a GPU, which is fast, one computes while the others read and write."""
    return nullcontext() if torch.device(device).type == "cpu" else threading.Lock()


def run(pieces: Iterable[Piece]) -> Iterator[int]:
    """Runs pieces of work on all cores, and yields the bytes that each has written."""
    pool = ThreadPoolExecutor(min(MOST_WORKERS, len(os.sched_getaffinity(0))))
    with _one_torch_thread_each():
        try:
            for future in as_completed([pool.submit(piece) for piece in pieces]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_torch_thread_each() -> Iterator[None]:
    """Keeps torch from splitting among all cores what every core does already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pieces_of(
    place: Place, source: BinaryIO, output: BinaryIO, device: Any, computing: AbstractContextManager[Any]
) -> Iterator[Piece]:  # fmt: skip
    """The work of writing one tensor at its place; each piece returns the bytes that it wrote."""
    entry, change = place.entry, place.change
    if change is None:
        for start in range(entry.start, entry.stop, CHUNK):
            size = min(CHUNK, entry.stop - start)
            yield partial(_copy, source, start, output, place.start + start - entry.start, size)
        return
    row_bytes = (entry.stop - entry.start) // max(1, entry.rows)
    for rows in change.steps(entry):
        compute = partial(change.rows, entry, source, rows, device)
        yield partial(_write, compute, computing, output, place.start + rows.start * row_bytes)


def _write(
    compute: Callable[[], Tensor], computing: AbstractContextManager[Any], output: BinaryIO, place: int
) -> int:  # fmt: skip
    with computing:
        tensor = compute().cpu()
    return write_at(tensor, output, place)


def write_at(tensor: Tensor, output: BinaryIO, place: int) -> int:
    """Writes the bytes of a tensor in the CPU's memory at a place of a file, and returns how many."""
    return _write_bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().data, output, place)


def _write_bytes(data: memoryview, output: BinaryIO, place: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(output.fileno(), data[done : done + WRITE], place + done)
    _begin_writing(output, place + done)
    return done


def _begin_writing(output: BinaryIO, end: int) -> None:
    """Makes the system write the bytes before `end` to the disk now, and forget those that are there already.

    Whole checkpoints in its cache would push out everything else, and fresh memory for them takes longer to get.
    """
    os.posix_fadvise(output.fileno(), 0, end, os.POSIX_FADV_DONTNEED)


def _copy(source: BinaryIO, start: int, output: BinaryIO, place: int, size: int) -> int:
    """Copies bytes within the kernel, where it can."""
    done = 0
    try:
        while done < size:
            copied = os.copy_file_range(
                source.fileno(), output.fileno(), size - done, start + done, place + done
            )  # fmt: skip
            if not copied:
                break
            done += copied
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
    _begin_writing(output, place + done)
    if done < size:
        buffer = memoryview(bytearray(size - done))
        fill(buffer, source, start + done, f"{size} bytes")
        _write_bytes(buffer, output, place + done)
    return size
