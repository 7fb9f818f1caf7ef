"""q = round(w * 127 / absmax(row)), scale = absmax / 127; the specification is `reference.quantize_rows`.

Launched without fusing multiplications and additions, which would round a product and its rounding at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import FLOAT16_MAX, INT8_MAX
from .launch import Launch, cdiv

_FLOAT16_MAX = tl.constexpr(FLOAT16_MAX)
_INT8_MAX = tl.constexpr(float(INT8_MAX))
# Adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to an integer, halves to even.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def through_float16(value):
    """Rounded to float16 and back to float32, saturating."""
    value = tl.minimum(tl.maximum(value.to(tl.float32), -_FLOAT16_MAX), _FLOAT16_MAX)
    return value.to(tl.float16).to(tl.float32)


@triton.jit
def quantize_tile(value16, absmax):
    """int8 codes of a `[BLOCK_N, BLOCK_K]` tile from `through_float16`, given absmax per row."""
    one = tl.full(absmax.shape, 1.0, tl.float32)
    factor = tl.where(absmax > 0, tl.div_rn(one, tl.where(absmax > 0, absmax, one)) * _INT8_MAX, 0.0)
    return ((value16 * factor[:, None] + _ROUND) - _ROUND).to(tl.int8)


@triton.jit
def _quantize_rows_kernel(
    w_ptr, stride_wn, stride_wk,  # [N, K]
    q_ptr, stride_qn,  # [N, K] int8
    scale_ptr,  # [N] float32
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    w_rows = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn
    absmax = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = mask_n[:, None] & ((k + offs_k)[None, :] < K)
        value = through_float16(tl.load(w_rows + (k + offs_k)[None, :].to(tl.int64) * stride_wk, inside, other=0.0))
        absmax = tl.maximum(absmax, tl.max(tl.abs(value), axis=1))
    tl.store(scale_ptr + offs_n, tl.div_rn(absmax, tl.full((BLOCK_N,), _INT8_MAX, tl.float32)), mask_n)
    for k in range(0, K, BLOCK_K):
        inside = mask_n[:, None] & ((k + offs_k)[None, :] < K)
        value = through_float16(tl.load(w_rows + (k + offs_k)[None, :].to(tl.int64) * stride_wk, inside, other=0.0))
        q_tile = q_ptr + offs_n[:, None].to(tl.int64) * stride_qn + (k + offs_k)[None, :]
        tl.store(q_tile, quantize_tile(value, absmax), inside)


def quantize_rows_launch(w: Tensor, q: Tensor, w_scale: Tensor) -> Launch:
    N, K = w.shape
    block_n, block_k = 4, 512
    return Launch(
        _quantize_rows_kernel,
        (cdiv(N, block_n),),
        dict(
            w_ptr=w, stride_wn=w.stride(0), stride_wk=w.stride(1), q_ptr=q, stride_qn=q.stride(0), scale_ptr=w_scale,
            N=N, K=K, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=4, enable_fp_fusion=False,
        ),
    )  # fmt: skip


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Launch `_quantize_rows_kernel`; the contract is in `reference.quantize_rows`."""
    q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    w_scale = torch.empty(w.shape[0], dtype=torch.float32, device=w.device)
    quantize_rows_launch(w, q, w_scale).run(w.device)
    return q, w_scale
