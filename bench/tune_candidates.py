"""Plans that may be the fastest for a size, and whether the compiler accepts them, which takes no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastlora import ops
from fastlora_kernels.gpu import aot
from fastlora_kernels.gpu.launch import Launch
from fastlora_kernels.gpu.lora_linear import planned_forward
from fastlora_kernels.gpu.lora_linear_backward import planned_backward
from fastlora_kernels.gpu.plan import DECODE_TOKENS, FUSED_TOKENS, Plan, safe_plan
from fastlora_kernels.gpu.tiles import MAX_BLOCK_R, Tile

BF16 = torch.bfloat16
WHY = "candidate"


@dataclass(frozen=True)
class Size:
    """One thing to tune: "forward" or "backward" of a LoRA linear in bfloat16, at M tokens and rank R."""

    op: str
    int8: bool
    p: float
    M: int
    N: int
    K: int
    R: int

    @property
    def name(self) -> str:
        weight = "int8" if self.int8 else "bf16"
        return f"{self.op} {weight}, {self.M} x {self.K} -> {self.N}, r={self.R}, p={self.p}"

    def operands(self, device: str, seed: int = 0) -> dict[str, Any]:
        """What `run` takes, random values on a real device."""
        random = torch.empty if device == "meta" else _random(device, seed)
        w = random(self.N, self.K, device=device)
        codes = torch.empty(self.N, self.K, dtype=torch.int8, device=device)
        scale = torch.empty(self.N, device=device)
        if self.int8 and device != "meta":
            codes, scale = ops.quantize_rows(w / self.K**0.5)
        return dict(
            x=random(self.M, self.K, device=device).to(BF16), d_y=random(self.M, self.N, device=device).to(BF16),
            s=random(self.M, self.R, device=device).to(BF16),
            w=codes if self.int8 else (w / self.K**0.5).to(BF16), w_scale=scale if self.int8 else None,
            a=random(self.R, self.K, device=device) / self.K**0.5, b=random(self.N, self.R, device=device) / 10,
            seed=torch.full((1,), 1234567 + seed, device=device) if self.p else None,
        )  # fmt: skip

    def run(self, plan: Plan, x: Tensor, d_y: Tensor, s: Tensor, w: Tensor, w_scale: Any, a: Tensor, b: Tensor,
            seed: Any) -> tuple[Tensor, ...]:  # fmt: skip
        if self.op == "forward":
            return planned_forward(plan, x, w, w_scale, None, a, b, 2.0, self.p, seed)
        return planned_backward(plan, d_y, x, s, w, w_scale, a, b, 2.0, self.p, seed, True, True, True)


def _random(device: str, seed: int) -> Any:
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *sizes, device: torch.randn(*sizes, generator=generator, device=device)


def candidates(size: Size, arch: int) -> list[Plan]:
    """Plans for a size, the safe one first."""
    safe = safe_plan(arch, BF16, size.M, size.N, size.K, size.R, size.int8, size.p, size.op)
    plans = [Plan(safe.kind, safe.tile, WHY), Plan("cublas", safe.tile, WHY)]
    fits = size.R <= MAX_BLOCK_R
    if size.op == "forward" and size.M <= DECODE_TOKENS and fits:
        plans += [Plan("decode", tile, WHY) for tile in decode_tiles()]
    elif size.op == "forward" and size.M <= FUSED_TOKENS and size.p == 0 and fits:
        plans += [Plan("fused", tile, WHY) for tile in product_tiles(size.M)]
    kinds = ("two_pass", "scratch") if size.int8 else ("two_pass",)
    if size.M > DECODE_TOKENS:
        plans += [Plan(kind, tile, WHY) for kind in kinds for tile in product_tiles(size.M)]
    return list(dict.fromkeys(plans))


def decode_tiles() -> Iterator[Tile]:
    for block_n, block_c, splits in product((32, 64, 128), (64, 128), (1, 4, 8, 16)):
        yield Tile(16, block_n, block_c, 4, 4, splits=splits)


def product_tiles(tokens: int) -> Iterator[Tile]:
    """Tiles of the products, those with the most tokens first."""
    for block_m, block_n, warps, stages in (
        (256, 128, 8, 3), (128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4),
        (32, 128, 4, 4), (16, 128, 4, 4),
    ):  # fmt: skip
        # A tile that is mostly beyond the tokens is a waste; so is a small one where there are many.
        if block_m <= max(16, 2 * tokens) and (tokens <= 256 or block_m >= 64):
            for persistent in (False, True):
                yield Tile(block_m, block_n, 64, warps, stages, tma=True, persistent=persistent)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside the block launches are kept instead of run."""
    found: list[Launch] = []
    run = Launch.run
    Launch.run = lambda self, device: found.append(self)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Launch.run = run  # type: ignore[method-assign]


def launches_of(plan: Plan, size: Size) -> list[Launch]:
    """What a plan launches, from tensors without memory."""
    with recorded() as found:
        size.run(plan, **size.operands("meta"))
    return found


def refusal(plan: Plan, size: Size, arch: int) -> str:
    """Why the compiler's result must not be launched: it fails, spills or takes too much shared memory; else empty.

    Replaces this process' Triton driver, so it is for processes that launch nothing.
    """
    for launch in launches_of(plan, size):
        try:
            compiled = aot.compile_for(launch, arch)
        except Exception as error:  # whatever the compiler raises is the result
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        if compiled.spilled:
            return f"spills {compiled.spilled} bytes"
        if compiled.shared > aot.SHARED_LIMIT[arch]:
            return f"takes {compiled.shared} bytes of shared memory"
    return ""
