"""Quantised weights, the dropout mask, a linear layer with one adapter, and merging the two."""

from __future__ import annotations

import torch
from torch import Tensor

from .int8 import FEW_TOKENS, INT8_MAX, int8_product

FLOAT16_MAX = 65504.0

# Odd multipliers of the dropout hash, the first two those of the `lowbias32` integer hash, and the golden ratio.
HASH_MULTIPLIER_1 = 0x7FEB352D
HASH_MULTIPLIER_2 = 0x846CA68B - (1 << 32)
HASH_MULTIPLIER_3 = 0x297A2D39
SEED_OFFSET = 0x9E3779B9 - (1 << 32)
LANE_BITS = 15
LANE_MASK = (1 << LANE_BITS) - 1


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax int8 quantisation per row: `w ~ q * w_scale[:, None]`.

    `w16 = w.half(); absmax = max |w16| per row; q = round(w16 * ((1 / absmax) * 127)); w_scale = absmax / 127`,
    each step rounded to float32, halves to even. These are the codes of LLM.int8 (Dettmers et al. 2022,
    section 2) as bitsandbytes computes them. Values past the range of float16 saturate; a row of zeros gets scale 0.

    Args:
        w: `[N, K]`, any float dtype, finite.

    Returns:
        q int8 `[N, K]`, contiguous, and w_scale float32 `[N]`.
    """
    w16 = w.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
    absmax = w16.abs().amax(dim=1).float()
    factor = torch.where(absmax > 0, absmax.reciprocal() * INT8_MAX, 0.0)
    return torch.round(w16.float() * factor[:, None]).to(torch.int8).contiguous(), absmax / INT8_MAX


def dequantize_rows(w: Tensor, w_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The dense weight in `dtype`: `w * w_scale[:, None]`, or `w` itself where it is dense. `[N, K]`."""
    if w_scale is None:
        return w.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return (w.to(wide) * w_scale.to(wide)[:, None]).to(dtype)


def drop_threshold(p: float) -> int:
    """A 15-bit lane below this number drops its element: `round(p * 2**15)`."""
    return round(p * (1 << LANE_BITS))


def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The dropout mask as a function of (seed, row, column): the same bits on every device.

    Word `m * ceil(K / 2) + k // 2` is hashed under two keys made from the seed; the low 15 bits of its lower
    half decide even columns, those of its upper half odd columns. All arithmetic is on int32 that wraps, with
    arithmetic right shifts. With one round less, masks correlate with themselves at some distances.

    Args:
        seed: one int64.
        M, K: rows and columns of the mask.
        p: probability to drop, in steps of 2**-15.

    Returns:
        bool `[M, K]`, true where the element is kept.
    """
    seed = seed.reshape(()).long()
    low, high = _wrap(seed), _wrap(seed >> 32)
    key_1 = _mix(low + _mix(high + SEED_OFFSET))
    key_2 = _mix(high + _mix(low + SEED_OFFSET))
    rows = torch.arange(M, device=seed.device)[:, None]
    columns = torch.arange(K, device=seed.device)[None, :]
    words = rows * ((K + 1) // 2) + columns // 2
    lanes = (_mix(words, key_1, key_2) >> (columns % 2 * 16)) & LANE_MASK
    return lanes >= drop_threshold(p)


def _mix(words: Tensor, key_1: Tensor | int = 0, key_2: Tensor | int = 0) -> Tensor:
    """Three multiply-xorshift rounds with a key added in the first two, on int32 values held in int64."""
    words = _wrap(words * HASH_MULTIPLIER_1 + key_1)
    words = words ^ (words >> 15)
    words = _wrap(words * HASH_MULTIPLIER_2 + key_2)
    words = words ^ (words >> 13)
    words = _wrap(words * HASH_MULTIPLIER_3)
    return words ^ (words >> 16)


def _wrap(value: Tensor) -> Tensor:
    """int64 reduced to the int32 with the same low 32 bits."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


def lora_linear(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A frozen linear layer plus its low-rank update (LoRA, Hu et al. 2021, eq. 3).

    `y = x W^T + bias + scale * s B^T` with `s = (x * mask / (1 - p)) A^T` and `W = w * w_scale[:, None]`.

    Args:
        x: `[M, K]`, any strides.
        w: `[N, K]`, any strides; a float dtype, or int8 with `w_scale`.
        w_scale: `[N]` for an int8 `w`, else None.
        bias: `[N]` or None.
        a, b: `[R, K]` and `[N, R]`, any float dtype; both None for the frozen layer alone.
        scale: the factor of the low-rank part (alpha / r).
        p, seed: dropout on the low-rank branch's input; `seed` holds one int64, None where p is 0.
        threshold: None multiplies in the dtype of x. A number multiplies an int8 `w` with int8 codes of x, elements
            from this magnitude on excepted (`int8_product`), where there are more than `FEW_TOKENS` tokens; the
            low-rank part and the gradients are the same.

    Returns:
        y `[M, N]` and s `[M, R]` (`[M, 0]` without a and b) in the dtype of x.
    """
    if threshold is not None and w_scale is not None and x.shape[0] > FEW_TOKENS:
        y = int8_product(x, w, w_scale, threshold)
    else:
        y = x @ dequantize_rows(w, w_scale, x.dtype).T
    if bias is not None:
        y = y + bias.to(x.dtype)
    if a is None or b is None:
        return y, x.new_empty(x.shape[0], 0)
    s = dropped(x, p, seed) @ a.to(x.dtype).T
    return y + scale * (s @ b.to(x.dtype).T), s


def lora_linear_backward(
    d_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear` with respect to x, a and b. The frozen weight has none.

    `d_s = scale * d_y B`, `d_x = d_y W + mask / (1 - p) * (d_s A)`,
    `d_a = d_s^T (x * mask / (1 - p))`, `d_b = scale * d_y^T s`.

    Args:
        d_y: `[M, N]`, any strides.
        x: `[M, K]`, needed for d_a only.
        s: `[M, R]` as returned by the forward, needed for d_b only.
        w, w_scale, a, b, scale, p, seed: as in the forward.
        needs_x, needs_a, needs_b: which gradients to compute.

    Returns:
        d_x in the dtype of d_y, d_a and d_b in those of a and b; an empty tensor for one that is not needed.
    """
    d_x, d_a, d_b = d_y.new_empty(0), d_y.new_empty(0), d_y.new_empty(0)
    if needs_x:
        d_x = d_y @ dequantize_rows(w, w_scale, d_y.dtype)
    if a is not None and b is not None:
        d_s = scale * (d_y @ b.to(d_y.dtype))
        if needs_x:
            d_x = d_x + dropped(d_s @ a.to(d_y.dtype), p, seed)
        if needs_a:
            d_a = (d_s.T @ dropped(x, p, seed)).to(a.dtype)
        if needs_b:
            d_b = (scale * (d_y.T @ s)).to(b.dtype)
    return d_x, d_a, d_b


def dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """`x * mask / (1 - p)`."""
    if p == 0 or seed is None:
        return x
    return x * dropout_mask(seed, x.shape[0], x.shape[1], p).to(x.device) / (1 - p)


def merge_rows(w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Folds an adapter into a frozen weight: `W + scale * B A`, quantised again where W is int8.

    The sum is formed in float64, so the result does not depend on the order of summation, then rounded through
    float32 to the dtype of w.

    Args:
        w, w_scale: the weight, as in `lora_linear`.
        a, b, scale: the adapter, as in `lora_linear`.

    Returns:
        The merged weight in the dtype and layout of w, and its scale float32 `[N]` (empty for a dense weight).
    """
    merged = dequantize_rows(w, w_scale, torch.float64) + scale * (b.double() @ a.double())
    merged_scale = w.new_empty(0, dtype=torch.float32)
    if w_scale is not None:
        merged, merged_scale = quantize_rows(merged.float())
    return torch.empty_like(w).copy_(merged), merged_scale
