"""Random adapters whose product is zero though neither A nor B is."""

from __future__ import annotations

import torch

from .target import Initial, Target, draw, features, rounded


def orthogonal(target: Target) -> Initial:
    """A and B random, of rank R / 2 and `B A = 0`: each lies in its own half of an orthonormal basis of R dimensions.

    With the rows Q of a random orthogonal `[R, R]` matrix, `A = (G_a Q_even)^T / 10` and `B = G_b Q_odd / 10`, G normal
    (Datta, "Rethinking LoRA initialisation", 2024).
    """
    device = draw(target)[0].device
    N, K = features(target.module)
    half = target.rank // 2
    basis, _ = torch.linalg.qr(torch.randn(target.rank, target.rank, device=device))
    a = (torch.randn(K, half, device=device) @ basis[0::2]).T / 10
    b = torch.randn(half, N, device=device).T @ basis[1::2] / 10
    return Initial(*rounded(target, a.contiguous(), b))
