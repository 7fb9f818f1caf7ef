"""The kernels beside the product with the weight, each launched by its name, for what compiles and measures them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .group import group_shrink_launch
from .launch import Launch
from .output_reduce import output_reduce_launch
from .shrink import shrink_launch
from .tiles import Tile
from .token_reduce import token_reduce_launch


@dataclass(frozen=True)
class Operands:
    """What the kernels of `SIDE_OPS` take at one size: M tokens, C features, rank R.

    Args:
        wide: `[M, C]`, the activations or the gradient of an output.
        narrow: `[M, R]`, s or its gradient.
        a: `[R, C]`; its transpose stands for B.
        seeds: `[layers]` int64 for as many layers as share A in `group_shrink`, else `[1]`.
        p: probability of dropout; `group_shrink` is for p above 0.
    """

    wide: Tensor
    narrow: Tensor
    a: Tensor
    seeds: Tensor
    p: float


def layers_of(op: str, R: int) -> int:
    """Of a group that has R rows of A in all: q, k and v, or gate and up."""
    return 1 if op != "group_shrink" else 3 if R % 3 == 0 else 2


def meta_operands(op: str, dtype: torch.dtype, M: int, C: int, R: int, p: float) -> Operands:
    """Operands without memory; A in float32, as adapters are kept."""

    def empty(*shape: int, of: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    seeds = empty(layers_of(op, R), of=torch.int64)
    return Operands(empty(M, C, of=dtype), empty(M, R, of=dtype), empty(R, C, of=torch.float32), seeds, p)


def side_launch(op: str, arch: int | None, given: Operands, tile: Tile | None = None) -> tuple[Launch, list[Tensor]]:
    """The launch of the kernel `op` of `SIDE_OPS`, and the tensors that it writes."""
    wide, narrow, a, seeds, p = given.wide, given.narrow, given.a, given.seeds, given.p
    like: dict[str, Any] = dict(dtype=wide.dtype, device=wide.device)
    s, d_a = torch.empty(narrow.shape, **like), torch.empty_like(a)
    if op == "shrink":
        return shrink_launch(wide, a, p, seeds, 1.0, s, arch, tile), [s]
    if op == "group_shrink":
        return group_shrink_launch(wide, a, p, seeds, s, arch, tile), [s]
    if op == "token_reduce":
        return token_reduce_launch(narrow, wide, 1.0, p, seeds, d_a, arch, tile), [d_a]
    b, d_b = a.T, torch.empty_like(a.T, memory_format=torch.contiguous_format)
    return output_reduce_launch(wide, narrow, b.contiguous(), 1.0, s, d_b, arch, tile), [s, d_b]
