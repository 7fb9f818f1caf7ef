"""Merging what several fine-tunings added to one weight, and writing a matrix as a product of low rank.

Task arithmetic: Ilharco et al. 2023, arXiv 2212.04089. TIES: Yadav et al. 2023, arXiv 2306.01708.
DARE: Yu et al. 2024, arXiv 2311.03099. Signs are elected before the weights apply, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Pruning(NamedTuple):
    """How a rule thins out: the share of elements that stays, and for a random choice the generator it draws from."""

    density: float
    generator: torch.Generator | None = None


class Rule(NamedTuple):
    """The steps of one way to merge: which elements stay, and whether those of the minority's sign are left out."""

    prune: Callable[[Tensor, Pruning], Tensor] | None
    elects_sign: bool


def merge_vectors(
    vectors: list[Tensor], weights: list[float], rule: str, pruning: Pruning | None = None, majority_sign: str = "total"
) -> Tensor:
    """`sum_i w_i p(v_i)`, or the mean of the `w_i p(v_i)` of the elected sign, element by element.

    Args:
        vectors: tensors v_i of one shape.
        weights: w_i, of any sign.
        rule: a key of `RULES`, which says what p prunes and whether a sign is elected.
        pruning: for the rules that prune.
        majority_sign: the sign of an element is that of the sum of the p(v_i) ("total") or that which most of them
            have ("frequency"); plus where it is a draw.
    """
    prune, elects_sign = RULES[rule]
    if prune is not None and pruning is not None and pruning.density < 1:
        vectors = [prune(vector, pruning) for vector in vectors]
    stacked = torch.stack(vectors)
    weighted = stacked * stacked.new_tensor(weights).view(-1, *[1] * vectors[0].dim())
    if not elects_sign:
        return weighted.sum(0)
    signs = stacked.sign()
    votes = (stacked if majority_sign == "total" else signs).sum(0)
    elected = signs == torch.where(votes >= 0, 1, -1)
    return (weighted * elected).sum(0) / elected.sum(0).clamp(min=1)


def _keep_largest(vector: Tensor, pruning: Pruning) -> Tensor:
    """The largest elements by magnitude, `int(density * size)` of them; the rest is zero."""
    flat = vector.flatten()
    kept = flat.abs().topk(int(pruning.density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(vector.shape)


def _keep_random(vector: Tensor, pruning: Pruning) -> Tensor:
    """Each element with probability `density`, divided by it, so that the expectation stays."""
    kept = torch.bernoulli(torch.full_like(vector, pruning.density), generator=pruning.generator)
    return vector * kept / pruning.density


RULES = {
    "linear": Rule(None, elects_sign=False),
    "magnitude_prune": Rule(_keep_largest, elects_sign=False),
    "ties": Rule(_keep_largest, elects_sign=True),
    "dare_linear": Rule(_keep_random, elects_sign=False),
    "dare_ties": Rule(_keep_random, elects_sign=True),
}


def factorize(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best A `[R, K]` and B `[N, R]` for `B A = delta`, with R at most `rank`; the rows of A are orthonormal."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]


def factorize_product(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`factorize(b @ a, rank)` for A `[R, K]` and B `[N, R]`, without the `[N, K]` product."""
    # With B = Q_b R_b and A^T = Q_a R_a, the singular values are those of the small R_b R_a^T. All of it is small
    # enough for float64, which not every device has.
    q_a, r_a = torch.linalg.qr(a.T.to("cpu", torch.float64))
    q_b, r_b = torch.linalg.qr(b.to("cpu", torch.float64))
    small_a, small_b = factorize(r_b @ r_a.T, rank)
    return (small_a @ q_a.T).to(a), (q_b @ small_b).to(b)
