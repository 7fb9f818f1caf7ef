"""`lora_linear_group` and its backward: x is cast once for all layers, and each adds to d_x in place.

The low-rank products stay one per layer: stacking A first was measured to cost as much as one wide product saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .linear import as_dtype, gradients, layer
from .plan import product_dtype


def lora_linear_group(
    x: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[Tensor | None],
    threshold: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    wide = as_dtype(x, product_dtype(x.dtype))
    layers = zip(ws, w_scales, biases, a_s, b_s, scales, ps, seeds, strict=True)
    compute = partial(layer, threshold=threshold)
    results = [compute(x, wide, *inputs) for inputs in layers]
    return [y for y, _ in results], [s for _, s in results]


def lora_linear_group_backward(
    d_ys: Sequence[Tensor | None],
    x: Tensor | None,
    ss: Sequence[Tensor | None],
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[Tensor | None],
    needs_x: bool,
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    narrow = next(d_y.dtype for d_y in d_ys if d_y is not None)
    wide = product_dtype(narrow)
    if x is not None and any(needs_a):
        x = as_dtype(x, wide)
    d_x, d_as, d_bs = None, [], []
    for i, d_y in enumerate(d_ys):
        d_a, d_b = None, None
        if d_y is not None:
            inputs = ss[i], ws[i], w_scales[i], a_s[i], b_s[i], scales[i], ps[i], seeds[i]
            d_x, d_a, d_b = gradients(as_dtype(d_y, wide), d_x, x, *inputs, needs_x, needs_a[i], needs_b[i])
        d_as.append(a_s[i].new_empty(0) if d_a is None else d_a)
        d_bs.append(b_s[i].new_empty(0) if d_b is None else d_b)
    return ws[0].new_empty(0, dtype=narrow) if d_x is None else as_dtype(d_x, narrow), d_as, d_bs
