"""The low-rank path in plain differentiable torch, for whatever the fused op does not compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops


def draw_seed(x: Tensor) -> Tensor:
    """A seed for a dropout mask, on the device of x, from torch's generator."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with elements dropped by the kernels' mask and the rest over `1 - p`; x itself at p = 0."""
    if p == 0:
        return x
    mask = ops.dropout_mask(draw_seed(x), x.numel() // x.shape[-1], x.shape[-1], p)
    return x * mask.view(x.shape) / (1 - p)


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`B A x` in the dtype of x; a `[R, K]`, b `[N, R]`."""
    return F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
