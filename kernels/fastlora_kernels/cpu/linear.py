"""`lora_linear` and its backward on the GEMMs of oneDNN and MKL.

Products run in the dtype that `plan.product_dtype` names. A weight in another dtype is cast into a scratch buffer that
lives on; int8 is cast, not dequantised, since the integers are exact in every float dtype, and the scale goes to
whichever side of the product is not the weight. For a few tokens an int8 or bfloat16 weight is read as it is, by
torch's matrix-vector kernels, and the low-rank part is computed in float32: a cast of A and B would cost more than
they do.
"""

from __future__ import annotations

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .dropout import drop_, dropped, keep_bits
from .plan import FEW_TOKENS, product_dtype

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
    threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    return layer(x, as_dtype(x, product_dtype(x.dtype)), w, w_scale, bias, a, b, scale, p, seed, threshold)


def layer(
    x: Tensor,
    wide: Tensor,
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
    """`lora_linear` where `wide` is x in the dtype of products."""
    dtype = x.dtype
    if threshold is not None and w_scale is not None and x.shape[0] > reference.FEW_TOKENS:
        y = quantized(x, wide.dtype, w, w_scale, bias, threshold)
    else:
        y = frozen(x, wide, w, w_scale, bias)
    if a is None or b is None:
        return as_dtype(y, dtype), x.new_empty(x.shape[0], 0)
    if x.shape[0] <= FEW_TOKENS:
        wide, y = as_dtype(wide, torch.float32), as_dtype(y, torch.float32)
    if p > 0 and seed is not None:
        wide = dropped(wide, keep_bits(seed, x.shape[0], x.shape[1], p))
        a = a / (1 - p)  # before a is rounded to the dtype of x, which costs no accuracy
    s = F.linear(wide, as_dtype(a, wide.dtype))
    y = y.addmm_(s, as_dtype(b, wide.dtype).T, alpha=scale)
    return as_dtype(y, dtype), as_dtype(s, dtype)


def frozen(x: Tensor, wide: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` in any dtype; `wide` is x in the dtype of products."""
    if w_scale is None:
        if x.shape[0] == 1 and x.dtype == w.dtype == torch.bfloat16:
            wide = x
        return F.linear(wide, _cast(w, wide.dtype), None if bias is None else as_dtype(bias, wide.dtype))
    codes_read_as_they_are = (
        x.shape[0] <= FEW_TOKENS
        and x.dtype == torch.bfloat16
        and w.shape[1] % INT8_KERNEL_STEP == 0
        and w.is_contiguous()
    )
    if codes_read_as_they_are:
        y = torch._weight_int8pack_mm(x.contiguous(), w, _ones(w.shape[0], x.dtype)) * w_scale
    else:
        y = F.linear(wide, _cast(w, wide.dtype)).mul_(w_scale)
    return y if bias is None else y.add_(bias)


def quantized(
    x: Tensor, dtype: torch.dtype, w: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """`reference.int8_product` and the bias in `dtype`.

    The codes are exact there, and faster than `_int_mm`: 6 against 19 ms in bfloat16 on AMX, and on AVX2, where that
    multiplies in scalar loops, 19 against 577 ms in float32, for 512 tokens.
    """
    q, x_scale, outliers = reference.quantize_tokens(x, threshold)
    y = F.linear(q.to(dtype), _cast(w, dtype)).float().mul_(x_scale[:, None])
    columns = outliers.any(dim=0).nonzero().flatten()
    if columns.numel():
        y.addmm_(outliers[:, columns].float(), w[:, columns].float().T)
    y.mul_(w_scale)
    return as_dtype(y if bias is None else y.add_(bias), dtype)


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
    inputs = x, s, w, w_scale, a, b, scale, p, seed, needs_x, needs_a, needs_b
    d_x, d_a, d_b = gradients(as_dtype(d_y, product_dtype(d_y.dtype)), None, *inputs)
    d_x, d_a, d_b = (d_y.new_empty(0) if gradient is None else gradient for gradient in (d_x, d_a, d_b))
    return as_dtype(d_x, d_y.dtype), d_a, d_b


def gradients(
    d_y: Tensor,
    d_x: Tensor | None,
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`lora_linear_backward` for a d_y in the dtype of products, which d_x gets too; one that is given is added to.

    None for what is not needed.
    """
    wide, d_a, d_b = d_y.dtype, None, None
    if needs_x:
        scaled = d_y if w_scale is None else (d_y * w_scale).to(wide)
        d_x = scaled @ _cast(w, wide) if d_x is None else d_x.addmm_(scaled, _cast(w, wide))
    if a is None or b is None:
        return d_x, d_a, d_b
    if needs_b and s is not None:
        d_b = as_dtype(d_y.T @ as_dtype(s, wide), b.dtype).mul_(scale)
    if needs_x or needs_a:
        d_s = d_y @ as_dtype(scale / (1 - p) * b, wide)
        keep = keep_bits(seed, d_y.shape[0], w.shape[1], p) if p > 0 and seed is not None else None
        if needs_a and x is not None:
            x = as_dtype(x, wide)
            d_a = as_dtype(d_s.T @ (x if keep is None else dropped(x, keep)), a.dtype)
        if d_x is not None and needs_x:
            if keep is None:
                d_x.addmm_(d_s, as_dtype(a, wide))
            else:
                d_x += drop_(d_s @ as_dtype(a, wide), keep)
    return d_x, d_a, d_b


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; even a call of `to` that does nothing takes as long as a small product."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


@functools.lru_cache(maxsize=64)
def _ones(count: int, dtype: torch.dtype) -> Tensor:
    """Scales for the int8 kernel, which would round the real ones to 16 bits."""
    with torch.inference_mode(False):
        return torch.ones(count, dtype=dtype)


def _cast(w: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`: itself, or a copy in this thread's scratch buffer that is valid until the next call."""
    if w.dtype == dtype:
        return w
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < w.numel():
        with torch.inference_mode(False):  # one made in inference mode could not be written outside it
            buffer = _scratch.buffer = torch.empty(w.numel(), dtype=dtype)
    return buffer[: w.numel()].view(w.shape).copy_(w)
