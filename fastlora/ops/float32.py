"""A linear layer on 16-bit operands with a float32 result.

float32 holds every 16-bit value, so these are the numbers of an x and a w that were cast up, but w is never kept in
float32: where the device's matrix product cannot give float32, blocks of rows are cast as they are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 8192  # of w in float32 at a time


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        ctx.dtype = x.dtype
        if x.is_cuda and x.dtype == w.dtype:
            return torch.mm(x, w.T, out_dtype=torch.float32)
        y = x.new_empty(x.shape[0], w.shape[0], dtype=torch.float32)
        wide = x.float()
        for y_block, w_block in zip(y.split(ROWS, dim=1), w.split(ROWS), strict=True):
            y_block.copy_(wide @ w_block.float().T)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        with torch.autocast(d_y.device.type, enabled=False):
            d_x = d_y.new_zeros(d_y.shape[0], w.shape[1])
            for d_block, w_block in zip(d_y.split(ROWS, dim=1), w.split(ROWS), strict=True):
                d_x.addmm_(d_block, w_block.float())
        return d_x.to(ctx.dtype), None


def linear_float32(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """`y = x W^T + bias` in float32 for a 16-bit x `[..., K]` and a 16-bit w `[N, K]`, under autocast too.

    The backward of a frozen w keeps nothing but w, and computes in float32; the gradient has x's dtype. A w that
    trains is cast as a whole.
    """
    with torch.autocast(x.device.type, enabled=False):
        if w.requires_grad and torch.is_grad_enabled():
            y = x.float() @ w.float().T
        else:
            y = _Float32Linear.apply(x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], w.shape[0])
        return y if bias is None else y + bias.float()
