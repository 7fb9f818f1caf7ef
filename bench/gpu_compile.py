"""Compiles what the later stages of `make gpu` launch, on every core: `python bench/gpu_compile.py`.

Triton keeps what it has compiled on disk, by source and specialisation, so that the stages that measure find it there.
What is missed here they compile themselves, one after the other, before they time it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError, as_completed
from itertools import product

import torch
from gpu_sanitizer import cases, mixed_launches
from gpu_stage import seconds_left
from rng_variants import VARIANTS, meta_launch
from tune import DROPOUT, FEATURES, groups
from tune_sizes import BF16, FIRST_TILES, AnySize, Size, refusal, refused

from fastlora_kernels.gpu.aot import specialisation
from fastlora_kernels.gpu.plan import Plan, choose_plan

RANK = 16
TOKENS = (8192, 1, 512, 2048, 16, 64, 256, 1024, 4096)  # of the first figures and of the target table, then of sweeps

Job = tuple[AnySize, Plan]


def first_figures(tokens: tuple[int, ...] = (512, 2048, 8192)) -> Iterator[Job]:
    """Our product without an adapter, by tile."""
    for tile, int8, M in product(FIRST_TILES, (False, True), tokens):
        yield Size("forward", int8, 0.0, M, 4096, 4096, 0), Plan("two_pass", tile, "")


def chosen(arch: int, gpu: str) -> Iterator[Job]:
    """What the operators launch at the sizes of the benchmarks."""
    for M, int8, op, p, (N, K) in product(TOKENS, (False, True), ("forward", "backward"), (DROPOUT, 0.0), FEATURES):
        if M == 8192 or (p == 0 and (N, K) in FEATURES[:2]):
            yield Size(op, int8, p, M, N, K, RANK), choose_plan(arch, BF16, M, N, K, RANK, int8, p, op, gpu)


def jobs(arch: int, gpu: str) -> Iterator[Job]:
    """Everything, the most important first."""
    yield from first_figures()
    yield from chosen(arch, gpu)
    yield from cases()
    for group in groups():
        for size in group:
            yield from ((size, plan) for plan in size.plans(arch))


def new_jobs(arch: int, gpu: str) -> Iterator[tuple[Job, int]]:
    """Those that compile something that those before them do not, and how many variants that is."""
    seen: set[tuple] = set()
    for size, plan in jobs(arch, gpu):
        found = {specialisation(launch) for launch in size.launches(plan, arch)} - seen
        if found:
            seen |= found
            yield (size, plan), len(found)


def refusal_of_generator(variant: str, arch: int) -> str:
    """What the compiler says to the shrink with one generator of its mask."""
    return refused([meta_launch(variant)], arch)


def refusal_of_mixed(arch: int) -> str:
    """What the compiler says to the batch of several adapters that is checked for memory errors."""
    return refused(mixed_launches(arch), arch)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU to compile for")
    major, minor = torch.cuda.get_device_capability()
    arch, gpu = 10 * major + minor, torch.cuda.get_device_name()
    pool = ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"))
    asked: dict[Future, tuple[str, int]] = {}
    for variant in VARIANTS:
        asked[pool.submit(refusal_of_generator, variant, arch)] = f"shrink by {variant}", 1
    for (size, plan), variants in new_jobs(arch, gpu):
        asked[pool.submit(refusal, plan, size, arch)] = f"{size.name}: {plan.kind} {plan.tile}", variants
    asked[pool.submit(refusal_of_mixed, arch)] = "mixed batch", len(mixed_launches(arch))
    done = 0
    try:
        for future in as_completed(asked, max(1.0, seconds_left(600.0))):
            name, variants = asked[future]
            done += variants
            if why := future.result():
                print(f"refused {name}: {why}", flush=True)
    except TimeoutError:
        print("the time was over", flush=True)
    print(f"compiled {done} of {sum(variants for _, variants in asked.values())} variants", flush=True)
    pool.shutdown(wait=False, cancel_futures=True)
    os._exit(0)  # whatever still compiles is not waited for


if __name__ == "__main__":
    main()
