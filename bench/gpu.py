"""Timing on a GPU: device events around calls over inputs that rotate through more memory than its L2 cache holds.

A contender is a list of calls that do the same with other tensors. One lap runs them all, once, and a sample is the
time of a lap per call. `graphed` replays a lap as a CUDA graph, without the time that Python takes to launch it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora_kernels.gpu.tables import tables_for

L2_FACTOR, MOST_COPIES = 3, 32
WARM_UPS = 3
FLUSHED = 1 << 29  # bytes: over any L2 cache
FLUSH_SECONDS = 1e-4  # that a GPU takes for them at least, at 5 TB/s
MOST_FLUSHES = 100

FAILED, OURS = "failed: ", ("fastlora", "our ")

Calls = Sequence[Callable[[], Any]]
Builder = Callable[[], Calls]


class NotInstalledError(Exception):
    """A peer's library is not there."""


class Lap:
    """Runs a contender's calls in turn."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __call__(self) -> None:
        for call in self.calls:
            call()


class Graph(Lap):
    """The same as one CUDA graph."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                Lap.__call__(self)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            Lap.__call__(self)

    def __call__(self) -> None:
        self.graph.replay()


def _flush() -> Callable[[], Any]:
    return torch.empty(FLUSHED, dtype=torch.int8, device="cuda").zero_


@dataclass(frozen=True)
class DeviceClock:
    """Seconds per call of a lap, by the GPU's own clock.

    Args:
        launch_bound: start with an idle GPU, so that the time is that of Python where it launches more slowly than the
            GPU works. Else the GPU is kept busy until the calls are queued, by as many flushes as that took last time.
        event, flush, synchronize: what CUDA has for it.
        queued: seconds that it took to queue a lap, by the lap.
    """

    launch_bound: bool = False
    event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)
    flush: Callable[[], Any] = field(default_factory=_flush)
    synchronize: Callable[[], Any] = torch.cuda.synchronize
    queued: dict[int, float] = field(default_factory=dict)

    def __call__(self, lap: Any) -> float:
        start, end = self.event(), self.event()
        wanted = 0.0 if self.launch_bound else 1.5 * self.queued.get(id(lap), 0.0)
        for _ in range(max(1, min(MOST_FLUSHES, math.ceil(wanted / FLUSH_SECONDS)))):
            self.flush()
        if self.launch_bound:
            self.synchronize()
        start.record()
        begin = time.perf_counter()
        lap()
        self.queued[id(lap)] = time.perf_counter() - begin
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(lap.calls)


def copies(bytes_per_call: int, device: str) -> int:
    """How many sets of tensors of this size exceed the L2 cache, so that no call finds its own there."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(MOST_COPIES, math.ceil(L2_FACTOR * cache / bytes_per_call)))


def prepare(builders: dict[str, Builder], graphed: bool, strict: bool) -> tuple[dict[str, Lap], dict[str, str]]:
    """Builds contenders and runs each once; those that cannot run are returned with the reason.

    Args:
        graphed: capture each as a CUDA graph.
        strict: let everything through but a library that is absent.
    """
    ready: dict[str, Lap] = {}
    notes: dict[str, str] = {}
    for name, build in builders.items():
        try:
            calls = build()
            Lap(calls)()
            ready[name] = Graph(calls) if graphed else Lap(calls)
        except NotInstalledError as error:
            notes[name] = f"not installed: {error}"
        except Exception as error:  # whatever a contender raises is its result, and the others still run
            if strict:
                raise
            notes[name] = f"{FAILED}{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
    return ready, notes


def failures(notes: dict[str, str]) -> list[str]:
    """What of ours could not run; a peer that cannot is news and no failure."""
    return [f"{name} {note}" for name, note in notes.items() if name.startswith(OURS) and note.startswith(FAILED)]


def machine() -> dict[str, Any]:
    """The GPU, and what runs it."""
    properties = torch.cuda.get_device_properties(0)
    tables = tables_for(10 * properties.major + properties.minor, properties.name)
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "l2_mib": round(properties.L2_cache_size / (1 << 20), 1),
        "cuda": torch.version.cuda,
        "plans": "; ".join(table.source() for table in tables) or "safe ones",
    }
