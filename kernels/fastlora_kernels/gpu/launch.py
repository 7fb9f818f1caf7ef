"""A kernel launch as data: it can be run on a GPU, or compiled for any GPU without one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One call of a jit kernel.

    Args:
        kernel: the jit function.
        grid: number of programs per axis.
        arguments: every argument by name, constexprs and compiler options (num_warps, num_stages) included.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    def run(self, device: torch.device) -> None:
        """Runs on `device`; a CPU only works under Triton's interpreter."""
        if 0 in self.grid:
            return
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments)

    def compile(self) -> Any:
        """Compiles for the active Triton target, specialised as `run` would; returns the compiled kernel."""
        return self.kernel.warmup(grid=self.grid, **self.arguments)


def device_arch(device: torch.device) -> int | None:
    """Compute capability as one number (90 for sm_90); None where there is no CUDA device."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def check_rank(rank: int, limit: int) -> None:
    if not 1 <= rank <= limit:
        raise ValueError(f"rank: expected 1 to {limit}, found {rank}")


def next_block(size: int, smallest: int = 16) -> int:
    """The power of two, at least `smallest`, that holds `size`."""
    return max(smallest, triton.next_power_of_2(size))


def operand(name: str, tensor: Tensor | None, axes: str) -> dict[str, Any]:
    """The kernel arguments of one 2-D tensor: its pointer and its strides, 0 where there is no tensor."""
    strides = (0, 0) if tensor is None else tensor.stride()
    return {f"{name}_ptr": tensor, f"stride_{name}{axes[0]}": strides[0], f"stride_{name}{axes[1]}": strides[1]}
