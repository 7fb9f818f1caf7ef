"""Measures plans and writes a table of the fastest: `python bench/tune.py [--results FOLDER] [--seconds S]`.

Candidates are compiled first, in as many processes as there are cores, and those that `make kernels` would refuse are
left out. The rest must be as accurate as eager PyTorch before they are timed, in turn, over inputs that exceed the L2
cache. A group of sizes enters the table when all its numbers of tokens are measured: a table with some alone would
serve the others with plans that were never meant for them. Without --results the table goes to the package.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from gpu import DeviceClock, Graph, Lap, copies
from gpu_stage import gpu_is_broken, seconds_left
from harness import Laps, rms, share
from torch import Tensor
from tune_sizes import BF16, AnySize, SideSize, Size, refusal

from fastlora_kernels.gpu import tables
from fastlora_kernels.gpu.plan import Plan

TOKENS = {
    "forward": (8192, 1, 512, 2048, 64, 16), "backward": (8192, 512, 2048, 64), "side": (8192, 2048, 512, 64),
    "int8": (8192, 2048, 512, 64),
}  # fmt: skip
FEATURES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
RANKS = (16, 64)
DROPOUT = 0.05
GRAPHED_TO = 64  # tokens, up to which Python launches more slowly than a GPU works
ROUNDS, BOUND = 20, 2.0


def groups() -> Iterator[list[AnySize]]:
    """Sizes that differ in their tokens alone, the most important first."""
    for R in RANKS:
        for op, K, p in (
            ("shrink", 4096, DROPOUT), ("output_reduce", 4096, 0.0), ("token_reduce", 4096, DROPOUT),
            ("group_shrink", 4096, DROPOUT), ("output_reduce", 14336, 0.0), ("shrink", 4096, 0.0),
        ):  # fmt: skip
            if op == "group_shrink" and R > 16:
                continue  # three of them are past the tiles that there is a choice of
            yield [SideSize(op, p, M, K, 3 * R if op == "group_shrink" else R) for M in TOKENS["side"]]
        for N, K in FEATURES:
            for op, int8, p in (
                ("forward", False, DROPOUT), ("backward", False, DROPOUT), ("forward", True, 0.0),
                ("forward", True, DROPOUT), ("backward", True, DROPOUT), ("forward", False, 0.0),
                ("backward", False, 0.0), ("backward", True, 0.0), ("int8", True, DROPOUT), ("int8", True, 0.0),
            ):  # fmt: skip
                yield [Size(op, int8, p, M, N, K, R) for M in TOKENS[op]]


def exact_and_bounds(size: AnySize, operands: dict[str, Any]) -> list[tuple[Tensor, float]]:
    """Each result in float64, and the RMS error that a plan may have: twice that of eager PyTorch in bfloat16."""
    exact, eager = size.eager(torch.float64, **operands), size.eager(BF16, **operands)
    return [(one, BOUND * rms(other.double() - one)) for one, other in zip(exact, eager, strict=True)]


def error_of(results: tuple[Tensor, ...], expected: list[tuple[Tensor, float]]) -> str:
    """What is wrong with a plan's results; empty where nothing is."""
    for index, (result, (exact, bound)) in enumerate(zip(results, expected, strict=True)):
        error = rms(result.double() - exact)
        if not error <= bound:
            return f"result {index}: RMS error {error:.3e}, allowed {bound:.3e}"
    return ""


Say = Callable[[str], None]


class BrokenGpuError(RuntimeError):
    """A plan has left the GPU unusable for this process."""


def fastest(size: AnySize, plans: list[Plan], device: str, clock: Any, say: Say) -> tables.Row | None:
    """The row of the plan with the smallest median time; None where none is right."""
    sets = [size.operands(device, seed) for seed in range(copies(size.bytes, device))]
    expected, laps, by_label = exact_and_bounds(size, sets[0]), {}, {}
    for plan in plans:
        label = f"{plan.kind} {plan.tile}"
        try:
            problem = error_of(size.run(plan, **sets[0]), expected)
        except Exception as error:  # a plan that this GPU or compiler does not take is not one for the table
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        if problem:
            say(f"  left out {label}: {problem}")
            if gpu_is_broken():
                raise BrokenGpuError(f"{size.name}, {label}: {problem}")
            continue
        calls = [partial(size.run, plan, **operands) for operands in sets]
        laps[label] = Graph(calls) if size.M <= GRAPHED_TO and device == "cuda" else Lap(calls)
        by_label[label] = plan
    if not laps:
        return None
    turns = Laps(laps, clock)
    turns.warm_up()
    for _ in range(ROUNDS):
        turns()
    medians = {label: share(samples, 0.5) for label, samples in turns.samples.items()}
    best = min(medians, key=lambda label: medians[label])
    say(f"{size.name}: {best}, {1e6 * medians[best]:.1f} us, of {len(medians)}; {others(medians)}")
    return row_of(size, by_label[best], 1e6 * medians[best])


def others(medians: dict[str, float]) -> str:
    """The best time of each kind of plan."""
    kinds: dict[str, float] = {}
    for label, median in medians.items():
        kind = label.split()[0]
        kinds[kind] = min(median, kinds.get(kind, median))
    return ", ".join(f"{kind} {1e6 * median:.1f}" for kind, median in kinds.items())


def row_of(size: AnySize, plan: Plan, microseconds: float) -> tables.Row:
    dropout = None if size.op == "output_reduce" else size.p > 0
    return tables.Row(
        size.op, "bfloat16", size.int8, dropout, size.R, size.M, size.N, size.K, plan.kind, plan.tile,
        round(microseconds, 2),
    )  # fmt: skip


Asked = list[tuple[AnySize, list[tuple[Plan, Future]]]]


def ask(group: list[AnySize], pool: ProcessPoolExecutor, arch: int) -> Asked:
    """The candidates for sizes, and what the compiler says to each once it has."""
    return [(size, [(plan, pool.submit(refusal, plan, size, arch)) for plan in size.plans(arch)]) for size in group]


def tune(file: Path, seconds: float, say: Say) -> None:
    """Tunes groups until the time is over, and writes the table after each."""
    end = time.monotonic() + seconds
    properties = torch.cuda.get_device_properties(0)
    arch = properties.major * 10 + properties.minor
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda or ""}
    clock = DeviceClock()
    rows: list[tables.Row] = []
    # Compiling needs no GPU, and a process with another driver for it must not have one.
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    try:
        waiting = groups()
        asked = ask(next(waiting), pool, arch)
        while asked:
            following = ask(next(waiting, []), pool, arch)  # compiled while the other group is measured
            found = tuned(asked, end, clock, say)
            if time.monotonic() > end:
                return
            rows += found
            date = datetime.now(UTC).isoformat(timespec="seconds")
            tables.write(tables.Table(properties.name, arch, True, versions, date, tuple(rows)), file)
            asked = following
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tuned(asked: Asked, end: float, clock: Any, say: Say) -> list[tables.Row]:
    """The rows of a group of sizes.

    Raises:
        TimeoutError: the compiler was not done at `end`.
    """
    rows = []
    for size, plans in asked:
        kept = []
        for plan, future in plans:
            if refused := future.result(max(1.0, end - time.monotonic())):
                say(f"  refused {plan.kind} {plan.tile}: {refused}")
            else:
                kept.append(plan)
        rows.append(fastest(size, kept, "cuda", clock, say))
        if time.monotonic() > end:
            break
    return [row for row in rows if row is not None]


def file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for the table, there called tuned-GPU.json")
    parser.add_argument("--seconds", type=float, default=seconds_left(86400.0), help="when to stop")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU to tune for")
    name = file_name(torch.cuda.get_device_name(0))
    file = tables.FOLDER / name if options.results is None else options.results / f"tuned-{name}"
    try:
        tune(file, options.seconds, partial(print, flush=True))
    except TimeoutError:
        print("the time was over before the compiler was done", flush=True)
    except BrokenGpuError as error:
        raise SystemExit(f"a plan broke the GPU, the rest was not tuned: {error}") from None
    print(f"table in {file}" if file.exists() else "no group of sizes was finished: there is no table")


if __name__ == "__main__":
    main()
