"""`lora_linear` and its backward on oneDNN GEMMs.

An int8 weight is cast, not dequantised, into a scratch buffer that lives on: the integers are exact in every
float dtype, and the scale goes to whichever side of the product is not the weight. For a few tokens it is read as
it is, by torch's int8 matrix-vector kernel, at half the bytes of a 16-bit weight.
"""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop_, dropped, keep_bits

FEW_TOKENS = 16  # up to here reading int8 beats casting it, measured on AVX512 at 1024 to 2752 features
INT8_KERNEL_STEP = 32  # the int8 kernel reads past rows that are no multiple of its vector

_scratch = threading.local()


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
) -> tuple[Tensor, Tensor]:
    if w_scale is None:
        y = F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        y = _times_int8(x, w).mul_(w_scale)
        if bias is not None:
            y += bias
    if a is None or b is None:
        return y, x.new_empty(x.shape[0], 0)
    if p > 0 and seed is not None:
        x = dropped(x, keep_bits(seed, x.shape[0], x.shape[1], p))
        a = a / (1 - p)  # before a is rounded to the dtype of x, which costs no accuracy
    s = F.linear(x, a.to(x.dtype))
    return y.addmm_(s, b.to(x.dtype).T, alpha=scale), s


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
    dtype = d_y.dtype
    d_x, d_a, d_b = d_y.new_empty(0), d_y.new_empty(0), d_y.new_empty(0)
    if needs_x:
        d_x = d_y @ w.to(dtype) if w_scale is None else (d_y * w_scale).to(dtype) @ _cast(w, dtype)
    if a is None or b is None:
        return d_x, d_a, d_b
    if needs_b:
        d_b = (d_y.T @ s).to(b.dtype).mul_(scale)
    if needs_x or needs_a:
        d_s = d_y @ (scale / (1 - p) * b).to(dtype)
        keep = keep_bits(seed, d_y.shape[0], w.shape[1], p) if p > 0 and seed is not None else None
        if needs_a:
            d_a = (d_s.T @ (x if keep is None else dropped(x, keep))).to(a.dtype)
        if needs_x:
            if keep is None:
                d_x.addmm_(d_s, a.to(dtype))
            else:
                d_x += drop_(d_s @ a.to(dtype), keep)
    return d_x, d_a, d_b


def _times_int8(x: Tensor, w: Tensor) -> Tensor:
    """`x @ w.T` for int8 codes, not yet scaled."""
    M, K = x.shape
    if M <= FEW_TOKENS and x.element_size() == 2 and K % INT8_KERNEL_STEP == 0 and w.is_contiguous():
        return torch._weight_int8pack_mm(x.contiguous(), w, _ones(w.shape[0], x.dtype))
    return F.linear(x, _cast(w, x.dtype))


@functools.lru_cache(maxsize=64)
def _ones(count: int, dtype: torch.dtype) -> Tensor:
    """Scales for the int8 kernel, which would round the real ones to 16 bits."""
    with torch.inference_mode(False):
        return torch.ones(count, dtype=dtype)


def _cast(w: Tensor, dtype: torch.dtype) -> Tensor:
    """An int8 weight in `dtype`, in this thread's scratch buffer: valid until the next call."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < w.numel():
        with torch.inference_mode(False):  # one made in inference mode could not be written outside it
            buffer = _scratch.buffer = torch.empty(w.numel(), dtype=dtype)
    return buffer[: w.numel()].view(w.shape).copy_(w)
