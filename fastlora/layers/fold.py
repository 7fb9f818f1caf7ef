"""`factor * W + scale * B A`: a weight with adapters in it, computed a block of rows at a time and rounded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops

# Elements of W in a block. A CPU holds a few wide copies of it, 4 to 8 bytes an element; a GPU none but the result,
# and needs the larger one to be busy.
CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 24


def row_blocks(w: Tensor) -> Iterator[slice]:
    """Slices of the rows of w."""
    elements = GPU_BLOCK if w.is_cuda else CPU_BLOCK
    step = max(1, elements // max(1, w.shape[1]))
    return (slice(start, min(start + step, w.shape[0])) for start in range(0, w.shape[0], step))


def itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Fold:
    """What folding adds to one parameter, or to one expert of it.

    Attributes:
        name: the parameter's name in its layer.
        a, b, scale: the low-rank part, `[R, K]`, `[N, R]` and its factor.
        factor: DoRA's, `[N, 1]` or `[1, K]`; None where W stays as it is.
        view: gives W `[N, K]` as a view of the parameter's memory.
        scale_name: the name of the parameter with the scale of an int8 W, None where W is dense.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: float
    factor: Tensor | None = None
    view: Callable[[Tensor], Tensor] = itself
    scale_name: str | None = None

    def rows(self, rows: slice, w: Tensor, w_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum in some rows, given those of W, in its dtype, and their scale `[n]` where W is int8."""
        b = self.b[rows]
        if self.factor is None:
            return ops.merge_rows(w, w_scale, self.a, b, self.scale)
        factor = self.factor[rows] if len(self.factor) > 1 else self.factor
        if w_scale is not None:
            return ops.merge_rows(w, w_scale * factor[:, 0], self.a, b, self.scale)
        wide = w.to(torch.promote_types(w.dtype, torch.float32)) * factor
        merged, none = ops.merge_rows(wide, None, self.a, b, self.scale)
        return merged.to(w.dtype), none

    def blocks(self, w: Tensor, w_scale: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """`rows` for all rows of W, with the slice of each block before it; W may be written to in between."""
        for rows in row_blocks(w):
            yield rows, *self.rows(rows, w[rows], None if w_scale is None else w_scale[rows])

    def write(self, w: Tensor, w_scale: Tensor | None, out: Tensor, out_scale: Tensor | None) -> None:
        """Writes the sum to `out` `[N, K]`, which may be w itself, and the scale of its rows to `out_scale`."""
        for rows, merged, merged_scale in self.blocks(w, w_scale):
            out[rows] = merged
            if out_scale is not None:
                out_scale[rows] = merged_scale

    def is_finite(self, w: Tensor, w_scale: Tensor | None) -> bool:
        """Whether the whole sum is, with nothing of the size of W made."""
        if self._is_bounded(w, w_scale):
            return True
        for _, merged, merged_scale in self.blocks(w, w_scale):
            # A code is always finite; its scale tells.
            if not torch.isfinite(merged if w_scale is None else merged_scale).all():
                return False
        return True

    def _is_bounded(self, w: Tensor, w_scale: Tensor | None) -> bool:
        """`|W| max |factor| + |scale| * sum over r of max |b_r| max |a_r|` is far inside the range: true of any sum.

        NaN compares false.
        """
        if w.numel() == 0:
            return True
        low, high = w.aminmax()
        largest = torch.maximum(-low.double(), high.double())
        for factor in (w_scale, self.factor):
            largest = largest if factor is None else largest * factor.double().abs().amax()
        low_rank = (self.b.double().abs().amax(dim=0) * self.a.double().abs().amax(dim=1)).sum()
        limit = torch.finfo(torch.float32 if w_scale is not None else w.dtype).max / 2
        return bool(largest + abs(self.scale) * low_rank < limit)
