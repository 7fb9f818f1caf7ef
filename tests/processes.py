"""Two processes that run one function, connected by gloo."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastlora.integrations.distributed import FIRST_WITH_INT8

PROCESSES = 2
SHARDS_INT8 = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= FIRST_WITH_INT8
INT8 = "int8" if SHARDS_INT8 else None  # for a sharded model that is quantized where it can be
needs_sharded_int8 = pytest.mark.skipif(not SHARDS_INT8, reason="FSDP2 of this torch shards no int8 weights")
LIMIT = 120  # seconds, for processes that wait for each other to start on a busy machine

# Children of a server that has imported what they need, and nothing of this process' state.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "fastlora", "torch.distributed.checkpoint.state_dict", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
])  # fmt: skip


def run_in_two(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns in each of two processes; numbers, strings and containers of them."""
    with two_processes(function, *arguments) as ends:
        results = [received(rank, end) for rank, end in enumerate(ends)]
    for rank, (_, error) in enumerate(results):
        assert not error, f"process {rank} failed:\n{error}"
    return [result for result, _ in results]


@contextmanager
def two_processes(function: Callable[..., Any], *arguments: Any) -> Iterator[list[Any]]:
    """The ends of pipes that the two processes send to, inside a `with` block that they do not outlive."""
    with tempfile.TemporaryDirectory() as folder:
        ends, children = [], []
        for rank in range(PROCESSES):
            here, there = _context.Pipe(duplex=False)
            child = _context.Process(target=_work, args=(rank, f"{folder}/store", there, function, arguments))
            child.start()
            there.close()
            ends.append(here)
            children.append(child)
        try:
            yield ends
        finally:
            for child in children:
                child.kill()
                child.join()


def received(rank: int, end: Any, limit: float = LIMIT) -> tuple[Any, str]:
    """A process' result and its error; of one that died, neither.

    Raises:
        TimeoutError: it has sent nothing for `limit` seconds.
    """
    if not end.poll(limit):
        raise TimeoutError(f"process {rank}: no result in {limit} s")
    try:
        return end.recv()
    except EOFError:
        return None, "it died"


def _work(rank: int, store: str, end: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    try:
        end.send((function(rank, *arguments), ""))
    except BaseException:
        end.send((None, traceback.format_exc()))
    dist.destroy_process_group()
