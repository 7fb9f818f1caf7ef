"""Compiles launches for any NVIDIA architecture on a machine without a GPU, and reads what came out.

The launchers themselves build the launches, from tensors on the meta device, so what is compiled is what would run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .dropout import dropout_mask_launch
from .input_gradient import input_gradient_launch
from .launch import Launch
from .linear import linear_launch
from .merge import merge_rows_launch
from .quantize import quantize_rows_launch
from .shrink import shrink_launch
from .token_reduce import token_reduce_launch

# Bytes of shared memory that one block may have (CUDA C programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
FEATURES = 4096
TOKENS = (1, 64, 8192)
RANKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    registers: int
    spilled: int  # bytes of stack per thread
    shared: int  # bytes
    matrix: str  # matrix instruction
    loads: str  # how global memory is read


class _Target:
    """Stands in for a CUDA driver: it knows an architecture and no device."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_for(launch: Launch, arch: int) -> Compiled:
    """Compiles `launch` for sm_`arch`; a failure raises what Triton or ptxas raise.

    Triton's active driver stays replaced: a process that compiles this way launches nothing afterwards.
    """
    driver.set_active(_Target(arch))
    kernel = launch.compile()
    ptx = kernel.asm["ptx"]
    registers, spilled = _resource_usage(kernel.asm["cubin"])
    return Compiled(registers, spilled, kernel.metadata.shared, _matrix_instruction(ptx), _global_loads(ptx))


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _matrix_instruction(ptx: str) -> str:
    if wgmma := re.search(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*(\{?)", ptx):
        return "wgmma, left in registers" if wgmma.group(1) else "wgmma"
    if "tcgen05.mma" in ptx:
        return "tcgen05"
    if sync := re.search(r"mma\.sync\S*?\.(f64|f32|s32)\.", ptx):
        return "mma.sync f64" if sync.group(1) == "f64" else "mma.sync"
    return "fma" if "fma.rn" in ptx else "-"


def _global_loads(ptx: str) -> str:
    if "cp.async.bulk.tensor" in ptx:
        return "TMA"
    if "cp.async" in ptx:
        return "cp.async"
    return "ld.global"


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def linear_launches(arch: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Every variant of the forward and the input gradient that the launchers choose between."""
    for tokens, int8, rank, p in product(TOKENS, (False, True), (0, *RANKS), (0.0, 0.1)):
        if rank == 0 and p > 0:
            continue
        x, d_y = _meta(tokens, FEATURES, dtype=dtype), _meta(tokens, FEATURES, dtype=dtype)
        w = _meta(FEATURES, FEATURES, dtype=torch.int8 if int8 else dtype)
        w_scale = _meta(FEATURES, dtype=torch.float32) if int8 else None
        a = _meta(rank, FEATURES, dtype=torch.float32) if rank else None
        b = _meta(FEATURES, rank, dtype=torch.float32) if rank else None
        s, seed = _meta(tokens, rank, dtype=dtype), _meta(1, dtype=torch.int64)
        label = f"M={tokens} {'int8' if int8 else 'dense'} r={rank} p={p}"
        for bias in (None, _meta(FEATURES, dtype=dtype)):
            launch = linear_launch(x, w, w_scale, bias, a, b, s if rank else None, 2.0, p, seed, d_y, arch)
            yield f"lora_linear {label}{' bias' if bias is not None else ''}", launch
        d_s = s if rank else None
        yield f"input_gradient {label}", input_gradient_launch(d_y, w, w_scale, d_s, a, p, seed, x, False, arch)


def reduction_launches(arch: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Every variant of the two kernels that contract over features or over tokens."""
    seed = _meta(1, dtype=torch.int64)
    for tokens, rank in product(TOKENS, RANKS):
        x, s = _meta(tokens, FEATURES, dtype=dtype), _meta(tokens, rank, dtype=dtype)
        b = _meta(FEATURES, rank, dtype=torch.float32)
        yield f"shrink M={tokens} r={rank}", shrink_launch(x, b.T, 0.0, None, 2.0, s, arch)
        out = _meta(rank, FEATURES, dtype=torch.float32)
        for p in (0.0, 0.1):
            yield f"token_reduce M={tokens} r={rank} p={p}", token_reduce_launch(s, x, 2.0, p, seed, out, arch)


def weight_launches(arch: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """The kernels that work on weights and masks."""
    seed = _meta(1, dtype=torch.int64)
    yield "dropout_mask", dropout_mask_launch(seed, _meta(64, FEATURES, dtype=torch.bool), 0.1)
    w, q = _meta(FEATURES, FEATURES, dtype=dtype), _meta(FEATURES, FEATURES, dtype=torch.int8)
    w_scale = _meta(FEATURES, dtype=torch.float32)
    yield "quantize_rows", quantize_rows_launch(w, q, w_scale)
    a, b = _meta(16, FEATURES, dtype=torch.float32), _meta(FEATURES, 16, dtype=torch.float32)
    scale, no_scale = _meta(1, dtype=torch.float64), _meta(0, dtype=torch.float32)
    yield "merge_rows int8", merge_rows_launch(q, w_scale, a, b, scale, q, w_scale)
    yield "merge_rows dense", merge_rows_launch(w, None, a, b, scale, w, no_scale)


def launches(arch: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Every variant that the launchers can launch for operands of `dtype` on sm_`arch`, by name."""
    yield from linear_launches(arch, dtype)
    yield from reduction_launches(arch, dtype)
    yield from weight_launches(arch, dtype)
