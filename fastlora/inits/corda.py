"""CorDA: the weight decomposed in the light of its inputs (Yang et al. 2024)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import batches, inputs_seen, token_mask, untouched
from .decompose import low_rank
from .target import Initial, Target, moved_into_adapter

FIRST_DAMPING = 0.01
MAX_INVERSE_ERROR = 0.05


@torch.no_grad()
def covariances(
    model: nn.Module, targets: list[Target], settings: dict[str, Any], calibration: Iterable
) -> dict[str, Tensor]:
    """The mean over all samples of `X^T X` `[K, K]` by target; X `[tokens, K]` is one row of a batch, without padding.

    As in PEFT, each X is first divided by the magnitude of its largest element. `use_float16_for_covariance` keeps
    the dtype of X, else all is float32.

    Raises:
        ValueError: an input is not finite, its largest element is zero, or a target is never called.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def add(mask: Tensor | None, target: Target, x: Tensor) -> None:
        for sample in _samples(x, mask):
            scaled = sample if settings["use_float16_for_covariance"] else sample.float()
            scaled = scaled / scaled.max().abs()
            product = scaled.T @ scaled
            if not torch.isfinite(product).all():
                raise ValueError(
                    f"calibration: expected finite inputs that are not zero, found others at {target.name!r}"
                )
            sums[target.name] = sums[target.name] + product if target.name in sums else product
            counts[target.name] += 1

    with untouched(model, training=False):
        for batch in batches(calibration, model):
            with inputs_seen(targets, partial(add, token_mask(batch, None))):
                model(**batch)
    for target in targets:
        if not counts[target.name]:
            raise ValueError(f"calibration: expected batches that reach every target, found none at {target.name!r}")
    return {name: total / counts[name] for name, total in sums.items()}


def _samples(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """The rows of a batch as `[tokens, K]`, without padding; those that have no token left out."""
    rows = list(x.reshape(-1, *x.shape[-2:]))
    if mask is not None and mask.shape == x.shape[:-1]:
        rows = [row[kept] for row, kept in zip(rows, mask, strict=True)]
    return [row for row in rows if row.numel()]


@torch.no_grad()
def corda(target: Target, settings: dict[str, Any], covariance: Tensor) -> Initial:
    """A part of `W = U S (V^T C^-1)` from the decomposition `W C = U S V^T`, C the covariance of the inputs.

    "ipm" takes the R largest singular values, which the inputs depend on most; "kpm" the R smallest, which keeps what
    the inputs depend on frozen (CorDA, section 3.2). `A = sqrt(S / scaling) V^T C^-1`, `B = U sqrt(S / scaling)`.
    """
    weight = target.dense()
    damped, inverse = _damped_inverse(covariance.to(weight.dtype))
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    first = 0 if settings["corda_method"] == "ipm" else s.shape[0] - target.rank
    kept = slice(first, first + target.rank)
    a, b = low_rank(u[:, kept], s[kept] / target.scaling, (vh @ inverse)[kept])
    return moved_into_adapter(target, weight, a, b)


def _damped_inverse(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The covariance and its inverse; the mean variance is added to its diagonal until that is an inverse."""
    identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
    damping = FIRST_DAMPING
    while True:
        damped = covariance + identity * covariance.diagonal().mean() * damping
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < MAX_INVERSE_ERROR:
            return damped, inverse
        damping *= 2
