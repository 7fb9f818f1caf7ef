"""Principal components of data that arrives in pieces."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

SEED = 42  # PEFT's, so that the randomised decompositions are the same
ITERATIONS = 4


class Components:
    """The first principal components of all rows seen (Ross et al. 2008, "Incremental learning for visual tracking").

    With components V and singular values S of n rows of mean m, n' rows X' of mean m' give the components of
    `[S V; X' - m'; sqrt(n n' / (n + n')) (m - m')]`.

    Attributes:
        vectors: `[count, K]`, the largest element of each positive; None before there were enough rows.
        values: the singular values `[count]`.
        explained: the shares of the variance of all rows `[count]`.
    """

    vectors: Tensor | None = None
    values: Tensor
    explained: Tensor

    def __init__(self, count: int, tau: float):
        """`count` components; one is settled once a step turns it by an angle of a cosine of at least `tau`."""
        self.count, self.tau = count, tau
        self._rows, self._scatter = 0, torch.zeros(())
        self._still = torch.zeros(count, dtype=torch.bool)

    def settled(self, count: int) -> bool:
        """Whether the first `count` are."""
        return bool(self._still[:count].all())

    def add(self, x: Tensor) -> None:
        """Takes rows `[rows, K]` in; a piece of fewer rows than components is left out, as in PEFT."""
        new = x.shape[0]
        if new < self.count:
            return
        x = x.float()
        mean = x.double().mean(dim=0)
        scatter = (x - mean).square().sum()
        before = self.vectors
        if before is None:
            self._mean, self._scatter, stacked = mean, scatter, (x - mean).float()
        else:
            total = self._rows + new
            shift = (self._rows * new / total) ** 0.5 * (self._mean - mean)
            stacked = torch.cat([self.values[:, None] * before, x - mean, shift[None]])
            self._scatter = self._scatter + scatter + shift.square().sum()
            self._mean = (self._rows * self._mean + new * mean) / total
        self._rows += new
        self.vectors, self.values = self._decompose(stacked)
        self.explained = self.values.square() / self._scatter
        if before is not None:
            self._still = cosine_similarity(self.vectors, before) >= self.tau

    def _decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first right singular vectors `[count, K]` and singular values `[count]`; sets torch's seed."""
        torch.manual_seed(SEED)
        _, s, v = torch.svd_lowrank(x, q=min(2 * self.count, *x.shape), niter=ITERATIONS)
        largest = v.gather(0, v.abs().argmax(dim=0, keepdim=True))
        return (v * largest.sign()).T[: self.count], s[: self.count]
