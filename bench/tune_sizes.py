"""What is tuned: an operator or a kernel at one size, its operands, its candidates, and the compiler on them.

Imports no more than the kernels: every process that compiles imports it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora_kernels import reference
from fastlora_kernels.gpu import aot
from fastlora_kernels.gpu.candidates import candidates, side_candidates
from fastlora_kernels.gpu.cost import meta_launches
from fastlora_kernels.gpu.int8_linear import int8_linear
from fastlora_kernels.gpu.launch import Launch, device_arch
from fastlora_kernels.gpu.lora_linear import planned_forward
from fastlora_kernels.gpu.lora_linear_backward import planned_backward
from fastlora_kernels.gpu.plan import Plan
from fastlora_kernels.gpu.quantize import quantize_rows
from fastlora_kernels.gpu.side import Operands, layers_of, meta_operands, side_launch
from fastlora_kernels.gpu.tiles import Tile, spread
from fastlora_kernels.reference import OUTLIER_THRESHOLD

BF16 = torch.bfloat16
SEED = 1234567
# Of our own product in the first figures, where the safe plan may be cuBLAS itself.
FIRST_TILES = [
    Tile(block_m, block_n, 64, 8, 3, tma=True, persistent=persistent)
    for block_m, block_n, persistent in ((128, 256, True), (256, 128, True), (128, 128, True), (128, 256, False))
]
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """The "forward", "backward" or "int8" (the forward with int8 activations) of a LoRA linear in bfloat16.

    M tokens, N out_features, K in_features, rank R, dropout p; `eager` knows no "int8".
    """

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

    @property
    def bytes(self) -> int:
        return 2 * self.M * (self.N + self.K) + (1 if self.int8 else 2) * self.N * self.K

    def operands(self, device: str, seed: int = 0) -> dict[str, Any]:
        """What `run` takes, with random values."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        w = random(self.N, self.K) / self.K**0.5
        codes, scale = quantize_rows(w) if self.int8 else (w.to(BF16), None)
        return dict(
            x=random(self.M, self.K).to(BF16), d_y=random(self.M, self.N).to(BF16), s=random(self.M, self.R).to(BF16),
            w=codes, w_scale=scale, a=random(self.R, self.K) / self.K**0.5, b=random(self.N, self.R) / 10,
            seed=torch.full((1,), SEED + seed, device=device) if self.p else None,
        )  # fmt: skip

    def run(
        self, plan: Plan, x: Tensor, d_y: Tensor, s: Tensor, w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor,
        seed: Tensor | None,
    ) -> Results:  # fmt: skip
        if self.op == "int8":
            return int8_linear(plan.tile, x, w, w_scale, None, a, b, 2.0, self.p, seed, OUTLIER_THRESHOLD)
        if self.op == "forward":
            return planned_forward(plan, x, w, w_scale, None, a, b, 2.0, self.p, seed)
        return planned_backward(plan, d_y, x, s, w, w_scale, a, b, 2.0, self.p, seed, True, True, True)

    def eager(self, dtype: torch.dtype, d_y: Tensor, s: Tensor, w_scale: Tensor | None, **given: Any) -> Results:
        """What `run` gives, by eager PyTorch in a dtype."""
        given = _cast(dtype, given) | dict(w_scale=w_scale, scale=2.0, p=self.p)
        if self.op == "forward":
            return reference.lora_linear(bias=None, **given)
        needs = dict(needs_x=True, needs_a=True, needs_b=True)
        return reference.lora_linear_backward(d_y.to(dtype), s=s.to(dtype), **needs, **given)

    def plans(self, arch: int) -> list[Plan]:
        """Those worth measuring."""
        return candidates(arch, BF16, self.M, self.N, self.K, self.R, self.int8, self.p, self.op)

    def launches(self, plan: Plan, arch: int) -> list[Launch]:
        return meta_launches(plan, arch, BF16, self.M, self.N, self.K, self.R, self.int8, self.p, self.op)


@dataclass(frozen=True)
class SideSize:
    """A kernel of `SIDE_OPS` in bfloat16, at M tokens with K features and rank R, with dropout p."""

    op: str
    p: float
    M: int
    K: int
    R: int
    int8: bool = False

    @property
    def N(self) -> int:  # noqa: N802
        return self.K

    @property
    def name(self) -> str:
        return f"{self.op}, {self.M} x {self.K}, r={self.R}, p={self.p}"

    @property
    def bytes(self) -> int:
        return 2 * self.M * self.K

    def operands(self, device: str, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator(device).manual_seed(seed)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        return dict(
            wide=random(self.M, self.K).to(BF16), narrow=random(self.M, self.R).to(BF16),
            a=random(self.R, self.K) / self.K**0.5, b=random(self.K, self.R) / self.K**0.5,
            seeds=SEED + seed + torch.arange(layers_of(self.op, self.R), device=device),
        )  # fmt: skip

    def run(self, plan: Plan, **given: Tensor) -> Results:
        """By a plan of the kind of `op`, whose tile's `splits` are programs per multiprocessor."""
        operands = Operands(**given, p=self.p)
        tile = spread(self.op, plan.tile, self.M, self.K)
        launch, written = side_launch(self.op, device_arch(operands.wide.device), operands, tile)
        launch.run(operands.wide.device)
        return tuple(written)

    def eager(self, dtype: torch.dtype, wide: Tensor, narrow: Tensor, a: Tensor, b: Tensor, seeds: Tensor) -> Results:
        """What `run` gives, by eager PyTorch in a dtype; gradients of A and B come in theirs where that is wider."""
        x, low, own = wide.to(dtype), narrow.to(dtype), torch.promote_types(dtype, a.dtype)
        if self.op == "output_reduce":
            return x @ b.to(dtype), (x.T @ low).to(own)
        if self.op == "token_reduce":
            return ((low.T @ self._dropped(x, seeds)).to(own),)
        parts = zip(seeds.split(1), a.to(dtype).chunk(len(seeds)), strict=True)
        return (torch.cat([self._dropped(x, seed) @ part.T for seed, part in parts], dim=1),)

    def _dropped(self, x: Tensor, seed: Tensor) -> Tensor:
        return x * reference.dropout_mask(seed, self.M, self.K, self.p) / (1 - self.p) if self.p else x

    def plans(self, arch: int) -> list[Plan]:
        return [Plan(self.op, tile, "") for tile in side_candidates(self.op, arch, BF16, self.M, self.K, self.R)]

    def launches(self, plan: Plan, arch: int) -> list[Launch]:
        operands = meta_operands(self.op, BF16, self.M, self.K, self.R, self.p)
        return [side_launch(self.op, arch, operands, spread(self.op, plan.tile, self.M, self.K))[0]]


AnySize = Size | SideSize


def _cast(dtype: torch.dtype, given: dict[str, Any]) -> dict[str, Any]:
    """Floating-point tensors in a dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def refusal(plan: Plan, size: AnySize, arch: int) -> str:
    """Why the compiler's result must not be launched: it fails, spills or takes too much shared memory; else empty."""
    return refused(size.launches(plan, arch), arch)


def refused(launches: Iterable[Launch], arch: int) -> str:
    """The same for launches; replaces this process' Triton driver, so it is for processes that launch nothing."""
    for launch in launches:
        try:
            compiled = aot.compile_for(launch, arch)
        except Exception as error:  # whatever the compiler raises is the result
            return f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        if compiled.spilled:
            return f"spills {compiled.spilled} bytes"
        if compiled.shared > aot.SHARED_LIMIT[arch]:
            return f"takes {compiled.shared} bytes of shared memory"
    return ""
