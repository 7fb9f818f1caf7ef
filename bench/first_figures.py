"""The five figures that fix every crossover of the plans: `python bench/first_figures.py FILE [--tiny]`.

    1  the share of cuBLAS' speed that our bf16 product reaches
    2  the share that our product with an int8 weight reaches, at 512, 2048 and 8192 tokens
    3  the rate of int8 x int8 products
    4  the time of the shrink, by the generator of its dropout mask
    5  the time that PEFT's layers take

Rows are written as soon as they are there. A figure that breaks the GPU for its process is left, and a new process
goes on with the next one.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import Builder, DeviceClock, copies, failures, machine, prepare
from gpu_layers import BF16, Place, Shape, check_linear, frozen, ours, peft_fp32, peft_layer, training
from gpu_stage import gpu_is_broken
from harness import Laps, append_rows, assert_accurate, rounds_within, rows_from_samples, rows_not_run
from rng_variants import VARIANTS, masked_shrink
from torch import Tensor
from tune_sizes import FIRST_TILES

from fastlora import ops
from fastlora_kernels import reference
from fastlora_kernels.gpu.jit import INTERPRETED
from fastlora_kernels.gpu.lora_linear import planned_forward
from fastlora_kernels.gpu.plan import Plan
from fastlora_kernels.gpu.tiles import Tile

CUBLAS = "bf16, cuBLAS"
SHAPES = [(8192, 4096, 4096), (8192, 4096, 14336)]
SECONDS = 0.5
RANK, DROPOUT = 16, 0.05

Write = Callable[..., None]


def bf16_product(place: Place, write: Write) -> None:
    for M, K, N in SHAPES:
        products(place.shape(M, K, N, p=0.0), "1: product with a bf16 weight", write, ours_int8=False)


def int8_weight_product(place: Place, write: Write) -> None:
    for M in (512, 2048, 8192):
        for N in (4096, 14336):
            products(place.shape(M, 4096, N, p=0.0), "2: product with an int8 weight", write, ours_int8=True)


def products(shape: Shape, question: str, write: Write, ours_int8: bool) -> None:
    """cuBLAS in bf16, our kernel without an adapter by tile, and what the op chooses with one."""
    check_linear(shape, int8=ours_int8)
    sets = range(shape.copies())
    xs, ws = [shape.x(seed) for seed in sets], [shape.weight(seed) for seed in sets]
    frozen_weights = [ops.quantize_rows(w) if ours_int8 else (w, None) for w in ws]
    a, b = shape.random(shape.r, shape.K, scale=shape.K**-0.5), shape.random(shape.N, shape.r)
    exact = xs[0].double() @ reference.dequantize_rows(*frozen_weights[0], torch.float64).T
    eager = xs[0] @ reference.dequantize_rows(*frozen_weights[0], BF16).T
    builders: dict[str, Builder] = {
        CUBLAS: lambda: [partial(torch.mm, x, w.T) for x, w in zip(xs, ws, strict=True)],
        f"fastlora, r={shape.r}, as chosen": lambda: [
            partial(ops.lora_linear, x, *w, None, a, b, 2.0) for x, w in zip(xs, frozen_weights, strict=True)
        ],
    }
    for tile in FIRST_TILES[:1] if shape.place.tiny else FIRST_TILES:
        name = f"our kernel, {tile.block_m} x {tile.block_n}{', persistent' if tile.persistent else ''}"
        builders[name] = partial(own_product, tile, xs, frozen_weights, exact, eager)
    work = {"flop": shape.flop(), "bytes": shape.bytes(1.0 if ours_int8 else 2.0)}
    write(question, shape.name, builders, [CUBLAS], shape.sizes, work)


def own_product(tile: Tile, xs: list[Tensor], weights: list, exact: Tensor, eager: Tensor) -> list[Callable[[], Any]]:
    """Calls of our product with a tile; what is not as accurate as eager PyTorch is not timed."""

    def product(x: Tensor, w: tuple[Tensor, Tensor | None]) -> Tensor:
        return planned_forward(Plan("two_pass", tile, ""), x, *w, None, None, None, 0.0, 0.0, None)[0]

    error = product(xs[0], weights[0]).double() - exact
    assert_accurate(f"tile {tile}", error, eager.double() - exact)
    return [partial(product, x, w) for x, w in zip(xs, weights, strict=True)]


def int8_products(place: Place, write: Write) -> None:
    for M, K, N in SHAPES:
        shape = place.shape(M, K, N, p=0.0)
        sets = range(shape.copies())
        # The product wants more than 16 rows and multiples of 8.
        size = [max(32, side) for side in (shape.M, shape.K, shape.N)]
        codes = [
            (whole_numbers(size[0], size[1], place.device), whole_numbers(size[2], size[1], place.device)) for _ in sets
        ]
        x, w = codes[0]
        assert torch.equal(torch._int_mm(x, w.T).double(), x.double() @ w.double().T)
        dense = [(x.to(BF16), w.to(BF16)) for x, w in codes]
        builders: dict[str, Builder] = {
            CUBLAS: lambda dense=dense: [partial(torch.mm, x, w.T) for x, w in dense],
            "int8 x int8, cuBLAS": lambda codes=codes: [partial(torch._int_mm, x, w.T) for x, w in codes],
        }
        work = {"flop": shape.flop(), "bytes": shape.bytes() / 2}
        write("3: product of int8 with int8", shape.name, builders, [CUBLAS], shape.sizes, work)


def whole_numbers(rows: int, columns: int, device: str) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)


def shrink_by_generator(place: Place, write: Write) -> None:
    shape = place.shape(8192, 4096, RANK, p=DROPOUT)
    seed = torch.tensor([1234567], device=place.device)
    xs = [shape.x(index) for index in range(copies(2 * shape.M * shape.K, place.device))]
    a = shape.random(RANK, shape.K, scale=shape.K**-0.5)
    mask = ops.dropout_mask(seed, shape.M, shape.K, DROPOUT)
    exact = (xs[0].double() * mask / (1 - DROPOUT)) @ a.double().T
    eager = (xs[0] * mask / (1 - DROPOUT)) @ a.to(BF16).T
    assert_accurate("shrink", masked_shrink(xs[0], a, DROPOUT, seed, "hash").double() - exact, eager.double() - exact)

    def variant_of(variant: str) -> list[Callable[[], Any]]:
        return [partial(masked_shrink, x, a, DROPOUT, seed, variant) for x in xs]

    builders: dict[str, Builder] = {variant: partial(variant_of, variant) for variant in VARIANTS}
    work = {"flop": 2.0 * shape.M * shape.K * RANK, "bytes": 2.0 * shape.M * shape.K}
    case = f"{shape.M} x {shape.K}, r={RANK}"
    write("4: shrink, by the generator of its mask", case, builders, ["none"], shape.sizes, work)


def peft_times(place: Place, write: Write) -> None:
    for M, K, N in SHAPES:
        shape = place.shape(M, K, N, p=DROPOUT)
        check_linear(shape)
        builders: dict[str, Builder] = {
            "frozen, cuBLAS": partial(training, frozen, shape),
            "PEFT bf16": partial(training, peft_layer, shape),
            "PEFT as users get it": partial(training, peft_fp32, shape, autocast=True),
            "fastlora bf16": partial(training, ours, shape),
        }
        work = {"flop": shape.flop(2), "bytes": 2 * shape.bytes()}
        over = ["frozen, cuBLAS", "PEFT bf16"]
        write("5: forward + backward of a layer", shape.name, builders, over, shape.sizes, work)


FIGURES = [bf16_product, int8_weight_product, int8_products, shrink_by_generator, peft_times]


def writer(place: Place, file: Path, failed: list[str]) -> Write:
    """A function that times contenders in turn and adds their rows to a file, and what of ours failed to `failed`."""
    facts = machine() if place.device == "cuda" and not place.tiny else None

    def write(
        question: str, case: str, builders: dict[str, Builder], over: list[str], sizes: dict[str, int],
        work: dict[str, float],
    ) -> None:  # fmt: skip
        ready, notes = prepare(builders, graphed=False, strict=place.tiny)
        failed.extend(f"{case}: {one}" for one in failures(notes))
        if place.tiny:
            return
        laps = Laps(ready, DeviceClock())  # type: ignore[arg-type]
        lap = laps.warm_up()
        for _ in range(0 if lap is None else rounds_within(SECONDS, lap)):
            laps()
        rows = rows_from_samples(question, case, laps, over, "us", 1e6, sizes, work)
        append_rows(file, rows + rows_not_run(question, case, notes), facts)
        for row in rows:
            rate = f"{row.work['flop'] / row.median / 1e6:8.1f} TFLOP/s" if row.median else ""
            ratios = "".join(f"  {ratio:.3f} x {name}" for name, ratio in row.ratios.items())
            print(f"{question}, {case}: {row.contender:28s} {row.median:9.1f} us {rate}{ratios}", flush=True)

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file for the rows")
    parser.add_argument("--tiny", action="store_true", help="once at tiny sizes, on any device, without timing")
    parser.add_argument("--after", type=int, default=0, help="how many figures to leave out")
    parser.add_argument("--failed", action="store_true", help="end with 1, for an earlier process that broke the GPU")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        raise SystemExit("there is no GPU: --tiny runs everything once without timing")
    if device == "cpu" and not INTERPRETED:
        raise SystemExit("there is no GPU: set TRITON_INTERPRET=1 to run the kernels without one")
    place, failed = Place(device, options.tiny), []
    write = writer(place, options.file, failed)
    for index, figure in enumerate(FIGURES[options.after :], options.after + 1):
        try:
            figure(place, write)
        except Exception as error:  # one figure less, and the others still come
            if options.tiny:
                raise
            failed.append(f"{figure.__name__}: {type(error).__name__}: {error}")
        if gpu_is_broken():
            print(f"the GPU is broken for this process: {failed}", flush=True)
            command = [__file__, str(options.file), "--after", str(index), "--failed"]
            os.execv(sys.executable, [sys.executable, *command])
    print("\n".join(f"failed: {one}" for one in failed) or "all figures are there", flush=True)
    if failed or options.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
