"""Several linear layers with adapters that read the same tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from .linear import lora_linear, lora_linear_backward


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
    """`lora_linear` of every layer of a group on one x: query, key and value, say, or gate and up.

    `y_i = x W_i^T + bias_i + scale_i * s_i B_i^T` with `s_i = (x * mask_i / (1 - p_i)) A_i^T`. Every layer has a rank,
    a dropout probability and a mask of its own.

    Args:
        x: `[M, K]`, any strides.
        ws, w_scales, biases, a_s, b_s, scales, ps, seeds: one per layer, each as in `lora_linear`.
        threshold: as in `lora_linear`, for all of them.

    Returns:
        y_i `[M, N_i]` and s_i `[M, R_i]` per layer, in the dtype of x.
    """
    layers = zip(ws, w_scales, biases, a_s, b_s, scales, ps, seeds, strict=True)
    compute = partial(lora_linear, threshold=threshold)
    results = [compute(x, *layer) for layer in layers]
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
    """Gradients of `lora_linear_group` with respect to x, a_s and b_s; `d_x` is the sum over the layers.

    Args:
        d_ys: `[M, N_i]` per layer, any strides; None for a layer whose output no one used, but not for all.
        x: `[M, K]`, needed where any of needs_a is true.
        ss: as returned by the forward, needed per layer where needs_b is true.
        ws, w_scales, a_s, b_s, scales, ps, seeds: as in the forward.
        needs_x, needs_a, needs_b: which gradients to compute, the last two per layer.

    Returns:
        d_x in the dtype of d_y, d_a and d_b per layer in those of a and b; an empty tensor for one that is not needed
        or belongs to a layer without d_y.
    """
    d_x = None
    d_as, d_bs = [a.new_empty(0) for a in a_s], [b.new_empty(0) for b in b_s]
    for i, d_y in enumerate(d_ys):
        if d_y is None:
            continue
        layer = ws[i], w_scales[i], a_s[i], b_s[i], scales[i], ps[i], seeds[i]
        part, d_a, d_b = lora_linear_backward(d_y, x, ss[i], *layer, needs_x, needs_a[i], needs_b[i])
        d_x = part if d_x is None else d_x + part
        d_as[i] = d_a if needs_a[i] else d_as[i]
        d_bs[i] = d_b if needs_b[i] else d_bs[i]
    assert d_x is not None, "no layer has a gradient"
    return d_x, d_as, d_bs
