"""The kernels beside the product with the weight, each launched by its name, for what compiles and measures them."""

from __future__ import annotations

from dataclasses import dataclass

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
        a, b: `[R, C]` and `[C, R]`.
        seeds: `[layers]` int64 for as many layers as share A in `group_shrink`, else `[1]`.
        p: probability of dropout; `group_shrink` is for p above 0.
    """

    wide: Tensor
    narrow: Tensor
    a: Tensor
    b: Tensor
    seeds: Tensor
    p: float


def layers_of(op: str, R: int) -> int:
    """Of a group that has R rows of A in all: q, k and v, or gate and up."""
    return 1 if op != "group_shrink" else 3 if R % 3 == 0 else 2


def meta_operands(op: str, dtype: torch.dtype, M: int, C: int, R: int, p: float) -> Operands:
    """Operands without memory; A in float32, as adapters are kept."""

    def empty(*shape: int, of: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    a, b = empty(R, C, of=torch.float32), empty(C, R, of=torch.float32)
    return Operands(empty(M, C, of=dtype), empty(M, R, of=dtype), a, b, empty(layers_of(op, R), of=torch.int64), p)


def side_launch(op: str, arch: int | None, given: Operands, tile: Tile | None = None) -> tuple[Launch, list[Tensor]]:
    """The launch of the kernel `op` of `SIDE_OPS`, and the tensors that it writes."""
    wide, a, b, seeds, p = given.wide, given.a, given.b, given.seeds, given.p
    if op == "token_reduce":
        d_a = torch.empty_like(a)
        return token_reduce_launch(given.narrow, wide, 1.0, p, seeds, d_a, arch, tile), [d_a]
    s = torch.empty(given.narrow.shape, dtype=wide.dtype, device=wide.device)
    if op == "output_reduce":
        d_b = torch.empty_like(b)
        return output_reduce_launch(wide, given.narrow, b, 1.0, s, d_b, arch, tile), [s, d_b]
    if op == "group_shrink":
        return group_shrink_launch(wide, a, p, seeds, s, arch, tile), [s]
    return shrink_launch(wide, a, p, seeds, 1.0, s, arch, tile), [s]
