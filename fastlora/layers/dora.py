"""DoRA (Liu et al. 2024): the direction of `W + s B A`, with a magnitude per output feature that trains.

    y = m / ||W + s B A|| * (W + s B A) x + bias

The norm runs over the input features, is detached (section 4.3 there), and needs neither a dense `B A` nor a dense W:

    ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B, B (A A^T)>    per row
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops


@torch.no_grad()
def squared_rows(w: Tensor, w_scale: Tensor | None) -> Tensor:
    """`||W||^2` per row `[N]`, float32 or wider, a block of rows at a time."""
    step = max(1, (1 << 22) // max(1, w.shape[1]))
    wide = torch.promote_types(w.dtype, torch.float32)
    squares = torch.cat([w[i : i + step].to(wide).square().sum(dim=1) for i in range(0, w.shape[0], step)])
    return squares if w_scale is None else squares * w_scale.to(wide).square()


@torch.no_grad()
def row_norm(squares: Tensor, w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`||W + s B A||` per row `[N]`, in the dtype of `squares`, which come from `squared_rows`."""
    a, b = a.to(squares.dtype), b.to(squares.dtype)
    cross = ops.lora_linear(a, w, w_scale)  # W A^T, [R, N]
    quadratic = (b @ (a @ a.T) * b).sum(dim=1)
    return (squares + 2 * scaling * (cross.T * b).sum(dim=1) + scaling**2 * quadratic).clamp_min(0).sqrt()
