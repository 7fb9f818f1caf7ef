"""What is tuned: one LoRA linear at one size, with its operands, its candidates and what the compiler says to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastlora import ops
from fastlora_kernels.gpu import aot
from fastlora_kernels.gpu.candidates import candidates
from fastlora_kernels.gpu.cost import meta_launches
from fastlora_kernels.gpu.lora_linear import planned_forward
from fastlora_kernels.gpu.lora_linear_backward import planned_backward
from fastlora_kernels.gpu.plan import Plan

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """The "forward" or "backward" of a LoRA linear in bfloat16, at M tokens and rank R, with dropout p."""

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
        """What `run` takes, with random values."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        w = random(self.N, self.K) / self.K**0.5
        codes, scale = ops.quantize_rows(w) if self.int8 else (w.to(BF16), None)
        return dict(
            x=random(self.M, self.K).to(BF16), d_y=random(self.M, self.N).to(BF16), s=random(self.M, self.R).to(BF16),
            w=codes, w_scale=scale, a=random(self.R, self.K) / self.K**0.5, b=random(self.N, self.R) / 10,
            seed=torch.full((1,), 1234567 + seed, device=device) if self.p else None,
        )  # fmt: skip

    def run(
        self, plan: Plan, x: Tensor, d_y: Tensor, s: Tensor, w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor,
        seed: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if self.op == "forward":
            return planned_forward(plan, x, w, w_scale, None, a, b, 2.0, self.p, seed)
        return planned_backward(plan, d_y, x, s, w, w_scale, a, b, 2.0, self.p, seed, True, True, True)

    def plans(self, arch: int) -> list[Plan]:
        """Those worth measuring."""
        return candidates(arch, BF16, self.M, self.N, self.K, self.R, self.int8, self.p, self.op)


def refusal(plan: Plan, size: Size, arch: int) -> str:
    """Why the compiler's result must not be launched: it fails, spills or takes too much shared memory; else empty.

    Replaces this process' Triton driver, so it is for processes that launch nothing.
    """
    launches = meta_launches(plan, arch, BF16, size.M, size.N, size.K, size.R, size.int8, size.p, size.op)
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
