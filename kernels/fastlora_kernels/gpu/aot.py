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
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import FEW_TOKENS
from .candidates import candidates, side_candidates
from .cost import meta_launches, mixed_meta_launches
from .dropout import dropout_mask_launch
from .launch import Launch
from .merge import merge_rows_launch
from .plan import Plan, choose_plan, side_tile
from .quantize import quantize_rows_launch
from .side import meta_operands, side_launch
from .tables import LINEAR_OPS
from .tiles import SIDE_OPS, spread

# Bytes of shared memory that one block may have (CUDA C programming guide, compute capabilities).
SHARED_LIMIT = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
WEIGHT_KERNELS = {"linear", "decode", "input_gradient", "int8_linear"}
# Integers that are no constexprs: their value does not change what is compiled.
RUN_TIME = {"M", "N", "K", "R", "C", "B", "E", "threshold", "k_per_split", "slice_tokens", "row_tokens"}
FEATURES = 4096
TOKENS = (1, 64, 512, 8192)
# Rank and dropout: the frozen layer alone, every padded rank that has tiles of its own, dropout off and on.
ADAPTERS = ((0, 0.0), (16, 0.0), (16, 0.1), (64, 0.0), (256, 0.1))
# Rows of A in a group: gate and up, and q, k and v of a small and of a large rank.
GROUPED = ((32, 0.1), (48, 0.1), (192, 0.1))

# Tokens, rows, and rank of eight adapters in a mixed batch: long and short rows in each size of tile.
MIXES = (
    (16, 16, 16), (16, 16, 64), (64, 64, 16), (64, 8, 64), (512, 8, 16), (512, 128, 16), (512, 8, 256), (8192, 8, 16),
    (8192, 8, 256), (8192, 512, 16),
)  # fmt: skip


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
    if lefts := re.findall(r"wgmma\.mma_async\S*\s*\{[^}]*\},\s*(\{?)", ptx):
        if "s32.s8.s8" in ptx:
            return "wgmma, int8"
        return "wgmma, left in registers" if all(lefts) else "wgmma"
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
    """What the chosen plans launch over the sizes, and on Hopper what the candidates for tuning would."""
    for op, tokens, int8, (rank, p) in product(LINEAR_OPS, TOKENS, (False, True), ADAPTERS):
        if op == "int8" and (not int8 or tokens <= FEW_TOKENS):
            continue
        size = tokens, FEATURES, FEATURES, rank, int8, p, op
        plans = [choose_plan(arch, dtype, *size)]
        if arch == 90 and dtype == torch.bfloat16 and rank in (16, 64):
            plans += candidates(arch, dtype, *size)
        for plan in dict.fromkeys(plans):
            yield from _named(plan, arch, dtype, tokens, rank, int8, p, op)


def _named(
    plan: Plan, arch: int, dtype: torch.dtype, tokens: int, rank: int, int8: bool, p: float, op: str
) -> Iterator[tuple[str, Launch]]:
    """The launches of one plan, each with the kernel's name and what it works on."""
    launches = meta_launches(plan, arch, dtype, tokens, FEATURES, FEATURES, rank, int8, p, op, bias=p > 0)
    for launch in launches:
        yield f"{_kernel(launch)}{op} {plan.kind} M={tokens} r={rank} p={p} {_tile(plan)}", launch


def _kernel(launch: Launch) -> str:
    """Its name, and what its weight is where it takes one; ends with a space."""
    kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    if "w_scale_ptr" not in launch.arguments:
        return f"{kernel} "
    return f"{kernel} {'dense' if launch.arguments['w_scale_ptr'] is None else 'int8'} "


def _tile(plan: Plan) -> str:
    tile, words = plan.tile, " tma" if plan.tile.tma else ""
    words += " persistent" if tile.persistent else ""
    return f"{tile.block_m}x{tile.block_n}x{tile.block_c} {tile.num_warps} warps {tile.num_stages} stages{words}"


def mixed_launches(arch: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """What batches of several adapters launch."""
    for op, (tokens, rows, rank), int8, p in product(("forward", "backward"), MIXES, (False, True), (0.0, 0.1)):
        size = tokens, FEATURES, FEATURES, [rank] * 8, rows, int8, p, op
        plan, launches = mixed_meta_launches(arch, dtype, *size)
        for launch in launches:
            name = f"{_kernel(launch)}{op} mixed {plan.kind} M={tokens} rows={rows} r=8x{rank} p={p} {_tile(plan)}"
            yield name, launch


def side_launches(arch: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """The kernels beside the product, with the tiles that are chosen and on Hopper those that tuning would try."""
    for op, tokens in product(SIDE_OPS, TOKENS):
        for rank, p in GROUPED if op == "group_shrink" else ((16, 0.0), (16, 0.1), (64, 0.0), (64, 0.1)):
            tiles = [side_tile(op, arch, dtype, tokens, FEATURES, rank, p)]
            if arch == 90 and dtype == torch.bfloat16 and (p > 0 or op == "output_reduce"):
                found = side_candidates(op, arch, dtype, tokens, FEATURES, rank)
                tiles += [spread(op, tile, tokens, FEATURES) for tile in found]
            for tile in dict.fromkeys(tiles):
                launch, _ = side_launch(op, arch, meta_operands(op, dtype, tokens, FEATURES, rank, p), tile)
                shape = f"{tile.block_m}x{tile.block_n or tile.block_c} {tile.num_warps} warps {tile.num_stages} stages"
                yield f"{op} M={tokens} r={rank} p={p} {shape}", launch


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
    """Every variant that the plans of `dtype` launch on sm_`arch`, by name, each once."""
    seen = set()
    every = linear_launches, mixed_launches, side_launches, weight_launches
    for name, launch in (made for launches_of in every for made in launches_of(arch, dtype)):
        if (variant := specialisation(launch)) not in seen:
            seen.add(variant)
            yield name, launch


def specialisation(launch: Launch) -> tuple:
    """What tells one compilation from another: Triton looks at dtypes, at 1 and at divisibility by 16."""
    described: list[tuple] = []
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            described.append((name, str(value.dtype)))
        elif isinstance(value, TensorDescriptor):
            described.append((name, str(value.base.dtype), *value.block_shape))
        elif isinstance(value, int) and (name.startswith("stride_") or name in RUN_TIME):
            described.append((name, value == 1, value % 16 == 0, value >= 1 << 31))
        else:
            described.append((name, isinstance(value, float) or value))
    return launch.kernel.__name__, *described
