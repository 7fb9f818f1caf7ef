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
from harness import Laps, rms, share
from torch import Tensor
from tune_sizes import BF16, Size, refusal

from fastlora_kernels import reference
from fastlora_kernels.gpu import tables
from fastlora_kernels.gpu.plan import Plan

TOKENS = {"forward": (8192, 1, 512, 2048, 64, 16), "backward": (8192, 512, 2048, 64)}
FEATURES = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
RANKS = (16, 64)
DROPOUT = 0.05
GRAPHED_TO = 64  # tokens, up to which Python launches more slowly than a GPU works
ROUNDS, BOUND = 20, 2.0


def groups() -> Iterator[list[Size]]:
    """Sizes that differ in their tokens alone, the most important first."""
    for R in RANKS:
        for N, K in FEATURES:
            for op, int8, p in (
                ("forward", False, DROPOUT), ("backward", False, DROPOUT), ("forward", True, 0.0),
                ("forward", True, DROPOUT), ("backward", True, DROPOUT), ("forward", False, 0.0),
                ("backward", False, 0.0), ("backward", True, 0.0),
            ):  # fmt: skip
                yield [Size(op, int8, p, M, N, K, R) for M in TOKENS[op]]


def exact_and_bounds(size: Size, operands: dict[str, Any]) -> list[tuple[Tensor, float]]:
    """Each result in float64, and the RMS error that a plan may have: twice that of eager PyTorch in bfloat16."""
    exact, eager = _eager(size, operands, torch.float64), _eager(size, operands, BF16)
    return [(one, BOUND * rms(other.double() - one)) for one, other in zip(exact, eager, strict=True)]


def _eager(size: Size, operands: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    cast = {
        name: value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point() and name != "w_scale"
        else value
        for name, value in operands.items()
    }
    d_y, s = cast.pop("d_y"), cast.pop("s")
    if size.op == "forward":
        return reference.lora_linear(bias=None, scale=2.0, p=size.p, **cast)
    return reference.lora_linear_backward(
        d_y, s=s, scale=2.0, p=size.p, needs_x=True, needs_a=True, needs_b=True, **cast
    )


def error_of(results: tuple[Tensor, ...], expected: list[tuple[Tensor, float]]) -> str:
    """What is wrong with a plan's results; empty where nothing is."""
    for index, (result, (exact, bound)) in enumerate(zip(results, expected, strict=True)):
        error = rms(result.double() - exact)
        if not error <= bound:
            return f"result {index}: RMS error {error:.3e}, allowed {bound:.3e}"
    return ""


Say = Callable[[str], None]


def fastest(size: Size, plans: list[Plan], device: str, clock: Any, say: Say) -> tables.Row | None:
    """The row of the plan with the smallest median time; None where none is right."""
    bytes_of_call = 2 * size.M * (size.N + size.K) + (1 if size.int8 else 2) * size.N * size.K
    sets = [size.operands(device, seed) for seed in range(copies(bytes_of_call, device))]
    expected, laps, by_label = exact_and_bounds(size, sets[0]), {}, {}
    for plan in plans:
        label = f"{plan.kind} {plan.tile}"
        try:
            problem = error_of(size.run(plan, **sets[0]), expected)
        except Exception as error:  # a plan that this GPU or compiler does not take is not one for the table
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        if problem:
            say(f"  left out {label}: {problem}")
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


def row_of(size: Size, plan: Plan, microseconds: float) -> tables.Row:
    return tables.Row(
        size.op, "bfloat16", size.int8, size.p > 0, size.R, size.M, size.N, size.K, plan.kind, plan.tile,
        round(microseconds, 2),
    )  # fmt: skip


def accepted(pool: ProcessPoolExecutor, size: Size, arch: int) -> list[tuple[Plan, Future]]:
    """Candidates, and what the compiler says to each once it has."""
    return [(plan, pool.submit(refusal, plan, size, arch)) for plan in size.plans(arch)]


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
        for group in groups():
            found = tuned(group, pool, arch, end, clock, say)
            if time.monotonic() > end:
                return
            rows += found
            date = datetime.now(UTC).isoformat(timespec="seconds")
            tables.write(tables.Table(properties.name, arch, True, versions, date, tuple(rows)), file)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def tuned(
    group: list[Size], pool: ProcessPoolExecutor, arch: int, end: float, clock: Any, say: Say
) -> list[tables.Row]:
    """The rows of a group of sizes, all of which are compiled while the first is measured.

    Raises:
        TimeoutError: the compiler was not done at `end`.
    """
    asked = {size: accepted(pool, size, arch) for size in group}
    rows = []
    for size, plans in asked.items():
        kept = []
        for plan, future in plans:
            refused = future.result(max(1.0, end - time.monotonic()))
            if refused:
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
    parser.add_argument("--seconds", type=float, default=86400.0, help="when to stop")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU to tune for")
    name = file_name(torch.cuda.get_device_name(0))
    file = tables.FOLDER / name if options.results is None else options.results / f"tuned-{name}"
    try:
        tune(file, options.seconds, partial(print, flush=True))
    except TimeoutError:
        print("the time was over before the compiler was done", flush=True)
    print(f"table in {file}" if file.exists() else "no group of sizes was finished: there is no table")


if __name__ == "__main__":
    main()
