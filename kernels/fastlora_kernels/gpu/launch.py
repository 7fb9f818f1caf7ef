"""A kernel launch as data: it can be run on a GPU, or compiled for any GPU without one."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One call of a jit kernel.

    Args:
        kernel: the jit function.
        grid: number of programs per axis.
        arguments: every argument by name, constexprs and compiler options (num_warps, num_stages) included.
        flops: multiplications and additions of its matrix products, those done more than once included.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    flops: int = 0

    def run(self, device: torch.device) -> None:
        """Runs on `device`; a CPU only works under Triton's interpreter, and on the meta device it is `recorded`."""
        if 0 in self.grid:
            return
        if device.type == "meta":
            _recording.get()[1].append(self)
            return
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments)

    def compile(self) -> Any:
        """Compiles for the active Triton target, specialised as `run` would; returns the compiled kernel."""
        return self.kernel.warmup(grid=self.grid, **self.arguments)


_recording: ContextVar[tuple[int | None, list[Launch]]] = ContextVar("recording")


@contextmanager
def recorded(arch: int | None) -> Iterator[list[Launch]]:
    """Collects what tensors on the meta device would launch on sm_`arch`."""
    launches: list[Launch] = []
    token = _recording.set((arch, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def device_arch(device: torch.device) -> int | None:
    """Compute capability as one number (90 for sm_90); None where there is no CUDA device."""
    return _recording.get()[0] if device.type == "meta" else _cuda_arch(device)


@functools.cache
def _cuda_arch(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def device_name(device: torch.device) -> str | None:
    """The GPU's name; None where there is no CUDA device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


# Triton's own functions for these two take as long as a small kernel, for what they do within one.
def cdiv(size: int, step: int) -> int:
    """How many steps cover `size`."""
    return -(-size // step)


def next_block(size: int, smallest: int = 16) -> int:
    """The power of two, at least `smallest`, that holds `size`."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


MOST_REGISTERS = 255  # that a thread can have


def without_spills(arch: int | None) -> dict[str, int]:
    """A compiler option: left to itself, ptxas spills a few registers so that more blocks may run at once.

    Not for Hopper, whose tiles are chosen by how they do there.
    """
    return {} if arch == 90 else {"maxnreg": MOST_REGISTERS}


def operand(name: str, tensor: Tensor | None, axes: str) -> dict[str, Any]:
    """The kernel arguments of one 2-D tensor: its pointer and its strides, 0 where there is no tensor."""
    strides = (0, 0) if tensor is None else tensor.stride()
    return {f"{name}_ptr": tensor, f"stride_{name}{axes[0]}": strides[0], f"stride_{name}{axes[1]}": strides[1]}
