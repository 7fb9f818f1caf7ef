"""y = x @ W.T + bias + scale * s @ B.T with s = dropout(x) @ A.T; the specification is `reference.lora_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import check_rank, device_arch
from .linear import linear_launch
from .tiles import MAX_RANK


def lora_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The contract is in `reference.lora_linear`. Rank up to 256."""
    if a is not None:
        check_rank(a.shape[0], MAX_RANK)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    s = torch.empty(x.shape[0], 0 if a is None else a.shape[0], dtype=x.dtype, device=x.device)
    given = None if a is None else s
    linear_launch(x, w, w_scale, bias, a, b, given, scale, p, seed, y, device_arch(x.device)).run(x.device)
    return y, s
