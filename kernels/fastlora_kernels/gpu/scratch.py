"""A copy of a weight in the dtype of x for the length of one call: `w * w_scale[:, None]` of an int8 one.

PyTorch's allocator hands the same memory to one layer after the other, so one copy of the largest weight is all
that it costs.
"""

from __future__ import annotations

import functools
import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import convert, load_tile, store_tile
from .launch import Launch, cdiv, operand

_logger = logging.getLogger("fastlora.kernels")


@triton.jit
def _dense_copy_kernel(
    w_ptr, stride_wn, stride_wk,  # [N, K]
    w_scale_ptr,  # [N] where W is int8
    out_ptr, stride_outn, stride_outk,  # [N, K]
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_n, first_k = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    offs_n = first_n + tl.arange(0, BLOCK_N)
    w = load_tile(w_ptr, stride_wn, stride_wk, first_n, first_k, N, K, BLOCK_N, BLOCK_K, False).to(tl.float32)
    if w_scale_ptr is not None:
        w *= tl.load(w_scale_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[:, None]
    dense = convert(w, out_ptr.dtype.element_ty)
    store_tile(out_ptr, stride_outn, stride_outk, first_n, first_k, N, K, dense, BLOCK_N, BLOCK_K, False)


def dense_copy_launch(w: Tensor, w_scale: Tensor | None, out: Tensor) -> Launch:
    N, K = w.shape
    block_n, block_k = 16, 512
    return Launch(
        _dense_copy_kernel,
        (cdiv(N, block_n), cdiv(K, block_k)),
        dict(
            **operand("w", w, "nk"), w_scale_ptr=w_scale, **operand("out", out, "nk"), N=N, K=K,
            BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4,
        ),
    )  # fmt: skip


def dense_copy(w: Tensor, w_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`w` where it is in `dtype`, else a copy that is; None where there is no memory for one, which is logged once."""
    if w.dtype == dtype:
        return w
    try:
        out = torch.empty(w.shape, dtype=dtype, device=w.device)
    except torch.OutOfMemoryError:
        _say_full(w.device)
        return None
    dense_copy_launch(w, w_scale, out).run(w.device)
    return out


@functools.cache
def _say_full(device: torch.device) -> None:
    _logger.warning("%s has no memory for a copy of a weight in the dtype of x: it is converted in the product", device)
