"""Launches every kernel at sizes of several ragged tiles under compute-sanitizer: `python bench/gpu_sanitizer.py`.

memcheck finds accesses to memory that is not a kernel's own, racecheck threads that use shared memory at once. Where
the tool is absent or does not work on this machine that is said, and is no failure.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from gpu_stage import seconds_left
from tune_sizes import BF16, AnySize, SideSize, Size

from fastlora_kernels import gpu as kernels
from fastlora_kernels.gpu.cost import mixed_meta_launches
from fastlora_kernels.gpu.launch import Launch
from fastlora_kernels.gpu.plan import Plan
from fastlora_kernels.gpu.tiles import SIDE_OPS, Tile, int8_tile
from fastlora_kernels.reference import FEW_TOKENS

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit code where a tool has found something
INSTALLED = "/usr/local/cuda/bin/compute-sanitizer"
SMALL = Tile(16, 32, 32, 4, 2)
LARGE = Tile(64, 128, 64, 8, 3, tma=True)  # warp groups and TMA, as the tiles of the tables
PLANS = {
    "forward": [
        Plan("decode", replace(SMALL, splits=3), ""), Plan("decode", replace(SMALL, tma=True, splits=2), ""),
        Plan("fused", SMALL, ""), Plan("two_pass", SMALL, ""), Plan("scratch", SMALL, ""), Plan("cublas", SMALL, ""),
        Plan("fused", LARGE, ""), Plan("two_pass", replace(LARGE, persistent=True), ""),
    ],
    "backward": [
        Plan("two_pass", SMALL, ""), Plan("scratch", SMALL, ""), Plan("cublas", SMALL, ""),
        Plan("two_pass", replace(LARGE, persistent=True), ""),
    ],
}  # fmt: skip
# What is ragged, and what tensor descriptors take: both several tiles a side. M, N, K, R.
SHAPES = ((37, 63, 100, 5), (270, 160, 192, 16))
# A batch of rows with adapters of their own: M, N, K, ranks, and the adapter of each row, -1 for none.
MIXED = (5 * 13, 41, 70, (3, 17, 5))
OWNERS = (2, 0, -1, -1, 1)
SIDE_TILES = {
    "shrink": Tile(32, 0, 64, 4, 3, splits=2), "group_shrink": Tile(32, 0, 64, 4, 2, splits=2),
    "output_reduce": Tile(32, 128, 0, 8, 3, splits=2), "token_reduce": Tile(32, 64, 0, 4, 3, splits=2),
}  # fmt: skip


def cases() -> Iterator[tuple[AnySize, Plan]]:
    """Every plan, and every kernel beside the product with its sum shared."""
    for M, N, K, R in SHAPES:
        for op, plans in PLANS.items():
            for plan in plans:
                tokens = min(M, 13) if plan.kind == "decode" else M
                yield Size(op, True, 0.1 if plan.kind in ("two_pass", "decode") else 0.0, tokens, N, K, R), plan
        tokens = max(M, 2 * FEW_TOKENS)
        yield Size("int8", True, 0.1, tokens, N, K, R), Plan("int8", int8_tile(None, 2), "")
    for op in SIDE_OPS:
        yield SideSize(op, 0.1, 1100, 1030, 6), Plan(op, SIDE_TILES[op], "")


def launch() -> None:
    """Everything once; the results are held to the reference by the tests, not here."""
    for size, plan in cases():
        size.run(plan, **size.operands("cuda"))
    mixed("cuda")
    w, a, b = (torch.randn(*shape, device="cuda") for shape in ((63, 100), (5, 100), (63, 5)))
    kernels.merge_rows(w.bfloat16(), None, a, b, 2.0)
    kernels.merge_rows(*kernels.quantize_rows(w), a, b, 2.0)
    kernels.dropout_mask(torch.ones(1, dtype=torch.int64, device="cuda"), 37, 101, 0.1)
    torch.cuda.synchronize()
    print("launched every kernel", flush=True)


def mixed(device: str) -> None:
    """The forward and backward of a batch of several adapters."""
    M, N, K, ranks = MIXED
    x, d_y = (torch.randn(M, width, device=device).to(BF16) for width in (K, N))
    w, w_scale = kernels.quantize_rows(torch.randn(N, K, device=device))
    a, b = torch.randn(sum(ranks), K, device=device), torch.randn(N, sum(ranks), device=device)
    shared = ranks, [2.0] * len(ranks), torch.tensor(OWNERS, device=device), [0.1] * len(ranks)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    _, s = kernels.lora_linear_mixed(x, w, w_scale, None, a, b, *shared, seed)
    kernels.lora_linear_mixed_backward(d_y, x, s, w, w_scale, a, b, *shared, seed, True, True, True)


def mixed_launches(arch: int | None) -> list[Launch]:
    """What `mixed` launches, on tensors without memory."""
    size = *MIXED, len(OWNERS), True, 0.1
    return [one for op in ("forward", "backward") for one in mixed_meta_launches(arch, BF16, *size, op)[1]]


def verdict(tool: str, code: int | None, output: str) -> str:
    """What a tool's run says in a few words; `code` is None where it was not over in time."""
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=====")]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "")
    if code is None:
        return f"{tool}: not over in time"
    if code == FOUND:
        return f"{tool}: FOUND {summary}"
    if code == 0 and summary:
        return f"{tool}: clean, {summary}"
    reason = next((line for line in lines if "not supported" in line or "rror" in line), f"exit code {code}")
    return f"{tool}: does not work on this machine, {reason}"


def check(sanitizer: str, tool: str, seconds: float) -> str:
    """Runs the launches under a tool, prints what it says and returns the verdict."""
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", sys.executable, __file__,
        "--launch",
    ]  # fmt: skip
    # Without PyTorch's cache every tensor is an allocation of its own, whose ends are known.
    variables = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=variables,
                                timeout=max(1.0, seconds))  # fmt: skip
    except subprocess.TimeoutExpired:
        return verdict(tool, None, "")
    print(f"---- {tool}\n{result.stdout[-20000:]}{result.stderr[-5000:]}", flush=True)
    return verdict(tool, result.returncode, result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", action="store_true", help="only launch the kernels")
    if parser.parse_args().launch:
        launch()
        return
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(INSTALLED)
    if sanitizer is None:
        print("not run: compute-sanitizer is not installed")
        return
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        verdicts = list(pool.map(lambda tool: check(sanitizer, tool, seconds_left(600.0)), TOOLS))
    print("; ".join(verdicts))
    sys.exit(any("FOUND" in one for one in verdicts))


if __name__ == "__main__":
    main()
