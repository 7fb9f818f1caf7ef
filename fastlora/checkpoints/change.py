"""What happens to one tensor of a checkpoint, computed a block of rows at a time.

W += sum of scale * B A      linear layers, convolutions and experts; transposed where the weight is stored as [K, N]
W = m / ||W + s B A|| * (W + s B A)                                                  DoRA
bias += scale * bias of B                                                            lora_bias
tensor = the adapter's, or some rows of it           modules_to_save, biases, embeddings, trained tokens

Every sum is formed in the steps of the layers' own merging in memory, so that the results are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastlora_kernels.reference import INT8_MAX

from .. import ops
from ..layers import dora
from .shards import CODES, DTYPES, Entry

STORED = DTYPES | CODES
BLOCK = 1 << 22  # elements of a tensor held at once
NORM_BLOCK = 1 << 24  # and where rows have norms, whose products want many of them


@dataclass(frozen=True)
class Term:
    """What one adapter adds to a matrix: `scale * b @ a`, for every expert of a tensor of three axes.

    Attributes:
        a, b: `[R, K]` and `[N, R]`, or `[E, R, K]` and `[E, N, R]`.
        magnitude: DoRA's, float32 `[N]`.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def to(self, device: Any) -> Term:
        magnitude = None if self.magnitude is None else self.magnitude.float().to(device)
        return Term(self.a.float().to(device), self.b.float().to(device), self.scale, magnitude)

    def rows(self, rows: slice) -> Term:
        """The part that belongs to some rows of the weight, or to some of its experts."""
        if self.b.dim() == 3:
            return Term(self.a[rows], self.b[rows], self.scale)
        return Term(self.a, self.b[rows], self.scale, None if self.magnitude is None else self.magnitude[rows])


@dataclass
class Change:
    """What happens to one tensor: it, or some of its rows, is replaced, then has products or a bias added.

    Attributes:
        terms: what is added, adapter after adapter.
        transposed: whether the tensor is stored as `[K, N]`.
        added: what a bias has added, float32 `[N]`, adapter after adapter.
        replaces_base: whether the replacement is of the base model, which the adapter's file brought along.
        tokens, token_rows: which rows are replaced, and by what: int64 `[T]` and `[T, D]`.
        absmax: where the absmax of the rows of an int8 tensor lies, `w = codes * absmax / 127`.
        new_absmax: that of the rows that were computed; nan of those that were not.
    """

    replacement: Tensor | None = None
    replaces_base: bool = False
    terms: list[Term] = field(default_factory=list)
    transposed: bool = False
    added: list[Tensor] = field(default_factory=list)
    tokens: Tensor | None = None
    token_rows: Tensor | None = None
    absmax: Entry | None = None
    new_absmax: Tensor | None = None

    def steps(self, entry: Entry) -> list[slice]:
        """Which rows are computed at once."""
        norms = any(term.magnitude is not None for term in self.terms)
        size = NORM_BLOCK if norms else BLOCK
        # The norms of a transposed weight run over its rows, which then are needed at once.
        step = entry.rows if norms and self.transposed else size // max(1, entry.columns)
        step = max(1, step)
        return [slice(start, min(start + step, entry.rows)) for start in range(0, entry.rows, step)]

    @torch.no_grad()
    def rows(
        self, entry: Entry, file: BinaryIO, rows: slice, device: Any, dtype: torch.dtype | None = None
    ) -> Tensor:  # fmt: skip
        """Some rows of the changed tensor, on the device.

        Raises:
            ValueError: a value is not finite.
        """
        w = entry.read(file, rows) if self.replacement is None else self.replacement[rows]
        w = w.to(device)
        if self.absmax is not None:
            scale = self._scale(self.absmax, rows, device)
            if dtype is None:
                return self._int8_rows(entry, w, scale, rows)
            w = w.to(dtype) * scale.to(dtype)[:, None]
        merged = self._applied(w.to(dtype or STORED[entry.dtype]), rows)
        _check_finite(entry.name, merged)
        return merged

    def _applied(self, w: Tensor, rows: slice) -> Tensor:
        if self.added:
            return (w + torch.stack([added[rows].to(w.device) for added in self.added]).sum(dim=0)).to(w.dtype)
        if self.tokens is not None and self.token_rows is not None:
            here = (self.tokens >= rows.start) & (self.tokens < rows.stop)
            places, values = self.tokens[here] - rows.start, self.token_rows[here]
            return w.index_copy(0, places.to(w.device), values.to(w.device, w.dtype))
        if not self.terms:
            return w
        if not self.transposed:
            parts = [term.rows(rows).to(w.device) for term in self.terms]
            if parts[0].b.dim() == 3:
                experts = [[Term(part.a[i], part.b[i], part.scale) for part in parts] for i in range(len(w))]
                return torch.stack([_merged(w[i], None, expert)[0] for i, expert in enumerate(experts)])
            return _merged(w.flatten(1), None, parts)[0].view(w.shape)
        terms = [term.to(w.device) for term in self.terms]
        if any(term.magnitude is not None for term in terms):
            return _merged(w.T, None, terms)[0].T
        a, b, scale = _stacked(terms)
        return _merge_rows(w, None, b.T, a.T[rows], scale)[0]

    def _scale(self, absmax: Entry, rows: slice, device: Any) -> Tensor:
        """Of the rows of an int8 weight."""
        with absmax.path.open("rb") as file:
            return absmax.read(file, rows).flatten().to(device).float() / INT8_MAX

    def _int8_rows(self, entry: Entry, codes: Tensor, scale: Tensor, rows: slice) -> Tensor:
        assert self.new_absmax is not None
        codes, scale = _merged(codes, scale, [term.rows(rows).to(codes.device) for term in self.terms])
        _check_finite(entry.name, scale)
        # absmax is a float16 value, which the rounding brings back exactly.
        self.new_absmax[rows] = (scale * INT8_MAX).half().float().cpu()
        return codes


@dataclass
class AbsmaxChange(Change):
    """The absmax of the rows of an int8 weight, which come from merging it.

    Attributes:
        weight, weight_change: that tensor, and what happens to it.
    """

    weight: Entry | None = None
    weight_change: Change | None = None

    def steps(self, entry: Entry) -> list[slice]:
        assert self.weight is not None
        assert self.weight_change is not None
        return self.weight_change.steps(self.weight)

    @torch.no_grad()
    def rows(
        self, entry: Entry, file: BinaryIO, rows: slice, device: Any, dtype: torch.dtype | None = None
    ) -> Tensor:  # fmt: skip
        assert self.weight is not None
        assert self.weight_change is not None
        assert self.weight_change.new_absmax is not None
        found = self.weight_change.new_absmax[rows]
        if found.isnan().any():  # the weight lies in another file, which was written by an earlier call or is to come
            with self.weight.path.open("rb") as other:
                self.weight_change.rows(self.weight, other, rows, device)
        return found.to(dtype or DTYPES[entry.dtype])


def _merge_rows(w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    # Not through the operator, whose first call imports a compiler: longer than merging a small model takes.
    return ops.implementation(w).merge_rows(w, w_scale, a, b, scale)


def _stacked(terms: list[Term]) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of one term that is the sum of several."""
    if len(terms) == 1:
        return terms[0].a, terms[0].b, terms[0].scale
    return torch.cat([term.a for term in terms]), torch.cat([term.scale * term.b for term in terms], dim=1), 1.0


def _merged(w: Tensor, w_scale: Tensor | None, terms: list[Term]) -> tuple[Tensor, Tensor]:
    """`W + sum of scale * B A` of a matrix `[N, K]`, and its scale where it is int8.

    Each DoRA adapter adds `(factor - 1) W + factor s B A`, so that all of them scale the rows of W together.
    """
    if all(term.magnitude is None for term in terms):
        a, b, scale = _stacked(terms)
        return _merge_rows(w, w_scale, a, b, scale)
    squares = dora.squared_rows(w, w_scale)
    factors, scaled = [], []
    for term in terms:
        factor = None
        if term.magnitude is not None:
            factor = term.magnitude / dora.row_norm(squares, w, w_scale, term.a, term.b, term.scale)
            factors.append(factor)
        scaled.append(term.scale * term.b * (1 if factor is None else factor[:, None]))
    a, b = torch.cat([term.a for term in terms]), torch.cat(scaled, dim=1)
    rows = 1 + torch.stack([factor - 1 for factor in factors]).sum(dim=0)
    if w_scale is not None:
        return _merge_rows(w, w_scale * rows, a, b, 1.0)
    merged, none = _merge_rows(w.float() * rows[:, None], None, a, b, 1.0)
    return merged.to(w.dtype), none


def _check_finite(name: str, tensor: Tensor) -> None:
    # A sum is finite only if all values are, and takes a thirtieth of the time of looking at each.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: expected finite merged weights, found inf or nan")
