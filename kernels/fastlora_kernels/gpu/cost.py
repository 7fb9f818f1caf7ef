"""What a plan costs, counted on the launches it makes: launches, bytes through memory, multiplications and additions.

Bytes are those of every tensor that a kernel takes, once per kernel: what must pass through memory where a kernel
reads again what the cache still holds, or parts of it ("_again_ptr"). Parts of sums are written and read once, mostly
in the cache, and counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import OUTLIER_THRESHOLD
from .int8_linear import int8_linear
from .launch import Launch, recorded
from .lora_linear import planned_forward
from .lora_linear_backward import planned_backward
from .plan import Plan


@dataclass(frozen=True)
class Cost:
    """Counts of one call.

    Args:
        launches: kernels of ours and products of PyTorch's.
        bytes: read and written, without the parts of sums.
        part_bytes: float32 parts of sums, written and read.
        flops: multiplications and additions of matrix products.
    """

    launches: int
    bytes: int
    part_bytes: int
    flops: int


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def meta_launches(
    plan: Plan, arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float,
    op: str = "forward", bias: bool = False,
) -> list[Launch]:  # fmt: skip
    """What `plan` launches on sm_`arch`, on tensors without memory; a and b are in float32."""
    w = _empty(N, K, dtype=torch.int8 if int8 else dtype)
    w_scale = _empty(N, dtype=torch.float32) if int8 else None
    a = _empty(R, K, dtype=torch.float32) if R else None
    b = _empty(N, R, dtype=torch.float32) if R else None
    x, seed = _empty(M, K, dtype=dtype), _empty(1, dtype=torch.int64)
    with recorded(arch) as launches:
        if op == "int8":
            bias_tensor = _empty(N, dtype=dtype) if bias else None
            int8_linear(plan.tile, x, w, w_scale, bias_tensor, a, b, 2.0, p, seed, OUTLIER_THRESHOLD)
        elif op == "forward":
            planned_forward(plan, x, w, w_scale, _empty(N, dtype=dtype) if bias else None, a, b, 2.0, p, seed)
        else:
            s, d_y = _empty(M, R, dtype=dtype), _empty(M, N, dtype=dtype)
            planned_backward(plan, d_y, x, s, w, w_scale, a, b, 2.0, p, seed, True, R > 0, R > 0)
    return launches


def cost(
    plan: Plan, arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, R: int, int8: bool, p: float,
    op: str = "forward",
) -> Cost:  # fmt: skip
    """Counts of one forward, or of one backward for all of x, a and b; see `choose_plan` for the arguments."""
    launches = meta_launches(plan, arch, dtype, M, N, K, R, int8, p, op)
    count, moved, flops = len(launches), sum(_bytes(one, parts=False) for one in launches), 0
    if plan.kind == "cublas":
        # With an adapter the product adds to what a kernel of ours left in the output.
        outputs = (2 if R else 1) * M * (N if op == "forward" else K)
        count, flops = count + 1, 2 * M * N * K
        moved += dtype.itemsize * (M * (K if op == "forward" else N) + N * K + outputs)
    part_bytes = 2 * sum(_bytes(one, parts=True) for one in launches)
    return Cost(count, moved, part_bytes, flops + sum(one.flops for one in launches))


def _bytes(launch: Launch, parts: bool) -> int:
    moved = {name: value for name, value in launch.arguments.items() if not name.endswith("_again_ptr")}
    return sum(_size(value) for name, value in moved.items() if name.endswith("part_ptr") == parts)


def _size(value: Any) -> int:
    tensor = value.base if isinstance(value, TensorDescriptor) else value
    return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
