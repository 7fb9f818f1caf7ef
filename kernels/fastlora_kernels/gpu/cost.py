"""What a plan costs, counted on the launches it makes: launches, bytes through memory, multiplications and additions.

Bytes are those of every tensor that a kernel takes, once per kernel: what must pass through memory where a kernel
reads again what the cache still holds, or parts of it ("_again_ptr"). Parts of sums are written and read once, mostly
in the cache, and counted apart.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .mixed import mixed_plan, planned_mixed
from .owners import owners_of
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
    return _total(meta_launches(plan, arch, dtype, M, N, K, R, int8, p, op), plan, dtype, M, N, K, R, op)


def mixed_meta_launches(
    arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, ranks: Sequence[int], rows: int, int8: bool,
    p: float, op: str = "forward",
) -> tuple[Plan, list[Launch]]:  # fmt: skip
    """The plan for a batch of so many rows with adapters of such ranks, and what it launches, as `meta_launches`."""
    w, w_scale = _empty(N, K, dtype=torch.int8 if int8 else dtype), _empty(N, dtype=torch.float32) if int8 else None
    a, b = _empty(sum(ranks), K, dtype=torch.float32), _empty(N, sum(ranks), dtype=torch.float32)
    x, d_y, s = _empty(M, K, dtype=dtype), _empty(M, N, dtype=dtype), _empty(M, max(ranks), dtype=dtype)
    seed, E = _empty(1, dtype=torch.int64), len(ranks)
    with recorded(arch) as launches:
        owners = owners_of(_empty(rows, dtype=torch.int64), M, ranks, [2.0] * E, [p] * E)
        plan = mixed_plan(op, x, w, w_scale, owners)
        if op == "forward":
            planned_mixed(plan, x, w, w_scale, None, a, b, owners, p, seed)
        else:
            planned_backward(plan, d_y, x, s, w, w_scale, a, b, 1.0, p, seed, True, True, True, owners=owners)
    return plan, launches


def mixed_cost(
    arch: int | None, dtype: torch.dtype, M: int, N: int, K: int, ranks: Sequence[int], rows: int, int8: bool,
    p: float, op: str = "forward",
) -> Cost:  # fmt: skip
    """Counts of one `lora_linear_mixed` or of its backward, where every row has an adapter of the largest rank.

    The gradients of a and b are filled with zeros before, which is not counted.
    """
    plan, launches = mixed_meta_launches(arch, dtype, M, N, K, ranks, rows, int8, p, op)
    return _total(launches, plan, dtype, M, N, K, max(ranks), op)


def _total(launches: Sequence[Launch], plan: Plan, dtype: torch.dtype, M: int, N: int, K: int, R: int, op: str) -> Cost:
    """The sum over launches, and the product of PyTorch's that the plan makes besides."""
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
