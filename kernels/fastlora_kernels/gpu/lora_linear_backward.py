"""Gradients of `lora_linear` for x, a and b; the specification is `reference.lora_linear_backward`.

d_s = scale * d_y @ B                                  shrink
d_a = d_s.T @ dropout(x),  d_b = scale * d_y.T @ s     token reduce
d_x = d_y @ W + mask / (1 - p) * (d_s @ A)             input gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from .input_gradient import input_gradient
from .launch import check_rank
from .shrink import shrink
from .tiles import MAX_RANK
from .token_reduce import token_reduce


def lora_linear_backward(
    d_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract is in `reference.lora_linear_backward`. Rank up to 256; the same inputs give the same bits."""
    d_x, d_a, d_b, d_s = d_y.new_empty(0), d_y.new_empty(0), d_y.new_empty(0), None
    if a is not None and b is not None:
        check_rank(a.shape[0], MAX_RANK)
        if needs_x or needs_a:
            d_s = shrink(d_y, b.T, scale=scale)
        if needs_a:
            d_a = torch.empty_like(a, memory_format=torch.contiguous_format)
            token_reduce(d_s, x, 1.0, p, seed, out=d_a)
        if needs_b:
            d_b = torch.empty_like(b, memory_format=torch.contiguous_format)
            token_reduce(s, d_y, scale, out=d_b.T)
    if needs_x:
        d_x = input_gradient(d_y, w, w_scale, d_s, a, p, seed)
    return d_x, d_a, d_b
