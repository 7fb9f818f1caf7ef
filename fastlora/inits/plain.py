"""Random adapters that leave the frozen weight alone, drawn from torch's CPU generator in PEFT's order."""

from __future__ import annotations

import math

import torch
from torch import nn

from .target import Initial, Target, draw, features, rounded


def plain(target: Target, method: bool | str) -> Initial:
    """True: A Kaiming uniform; "gaussian": A normal with deviation 1 / R; B is zero (LoRA, section 4.1).

    False leaves both as random as new linear layers are.
    """
    a, b = draw(target)
    if method == "gaussian":
        nn.init.normal_(a, std=1 / target.rank)
    elif method:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    if method is not False:
        nn.init.zeros_(b)
    return Initial(*rounded(target, a, b))


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
