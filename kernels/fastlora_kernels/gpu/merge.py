"""merged = W + scale * B @ A, requantised where W is int8, in one kernel and without a dense copy of W.

The sum is formed in float64, so that it rounds as `reference.merge_rows` does whatever the order of summation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import convert, dot
from .launch import Launch, cdiv
from .quantize import _INT8_MAX, quantize_tile, through_float16
from .tiles import merge_tile


@triton.jit
def _merged_tile(
    w_rows, stride_wk, row_scale, a_ptr, stride_ar, stride_ak, b_rows, stride_br, mask_n, offs_k, scale, K, R,
    QUANTIZED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """float64 tile `[BLOCK_N, BLOCK_K]` of the merged weight."""
    mask_k = offs_k < K
    delta = tl.zeros((BLOCK_N, BLOCK_K), tl.float64)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        b = tl.load(b_rows + offs_r[None, :] * stride_br, mask_n[:, None] & mask_r[None, :], other=0.0)
        a_tile = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + offs_k[None, :].to(tl.int64) * stride_ak
        a = tl.load(a_tile, mask_r[:, None] & mask_k[None, :], other=0.0)
        delta = dot(b.to(tl.float64), a.to(tl.float64), delta)
    w = tl.load(w_rows + offs_k[None, :].to(tl.int64) * stride_wk, mask_n[:, None] & mask_k[None, :], other=0)
    w = w.to(tl.float64)
    if QUANTIZED:
        w *= row_scale[:, None]
    return w + scale * delta


@triton.jit
def _merge_rows_kernel(
    w_ptr, stride_wn, stride_wk,  # [N, K]
    w_scale_ptr,  # [N] where W is int8
    a_ptr, stride_ar, stride_ak,  # [R, K]
    b_ptr, stride_bn, stride_br,  # [N, R]
    scale_ptr,  # [1] float64
    out_ptr, stride_on, stride_ok,  # [N, K]
    out_scale_ptr,  # [N] float32 where W is int8
    N, K, R,
    QUANTIZED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    scale = tl.load(scale_ptr)
    w_rows = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn
    b_rows = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn
    out_rows = out_ptr + offs_n[:, None].to(tl.int64) * stride_on
    row_scale = tl.zeros((BLOCK_N,), tl.float64)
    absmax = tl.zeros((BLOCK_N,), tl.float32)
    if QUANTIZED:
        row_scale = tl.load(w_scale_ptr + offs_n, mask_n, other=0.0).to(tl.float64)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            merged = _merged_tile(
                w_rows, stride_wk, row_scale, a_ptr, stride_ar, stride_ak, b_rows, stride_br, mask_n, offs_k, scale,
                K, R, QUANTIZED, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip
            absmax = tl.maximum(absmax, tl.max(tl.abs(through_float16(merged)), axis=1))
        tl.store(out_scale_ptr + offs_n, tl.div_rn(absmax, tl.full((BLOCK_N,), _INT8_MAX, tl.float32)), mask_n)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        merged = _merged_tile(
            w_rows, stride_wk, row_scale, a_ptr, stride_ar, stride_ak, b_rows, stride_br, mask_n, offs_k, scale,
            K, R, QUANTIZED, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        inside = mask_n[:, None] & (offs_k[None, :] < K)
        out_tile = out_rows + offs_k[None, :].to(tl.int64) * stride_ok
        if QUANTIZED:
            tl.store(out_tile, quantize_tile(through_float16(merged), absmax), inside)
        else:
            tl.store(out_tile, convert(merged.to(tl.float32), out_ptr.dtype.element_ty), inside)


def merge_rows_launch(
    w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scale: Tensor, out: Tensor, out_scale: Tensor
) -> Launch:
    N, K = w.shape
    tile = merge_tile()
    return Launch(
        _merge_rows_kernel,
        (cdiv(N, tile.block_n),),
        dict(
            w_ptr=w, stride_wn=w.stride(0), stride_wk=w.stride(1), w_scale_ptr=w_scale,
            a_ptr=a, stride_ar=a.stride(0), stride_ak=a.stride(1),
            b_ptr=b, stride_bn=b.stride(0), stride_br=b.stride(1), scale_ptr=scale,
            out_ptr=out, stride_on=out.stride(0), stride_ok=out.stride(1), out_scale_ptr=out_scale,
            N=N, K=K, R=a.shape[0], QUANTIZED=w_scale is not None,
            BLOCK_N=tile.block_n, BLOCK_K=tile.block_c, BLOCK_R=16, num_warps=tile.num_warps, enable_fp_fusion=False,
        ),
    )  # fmt: skip


def merge_rows(w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Launch `_merge_rows_kernel`; the contract is in `reference.merge_rows`."""
    out = torch.empty_like(w)
    out_scale = torch.empty(w.shape[0] if w_scale is not None else 0, dtype=torch.float32, device=w.device)
    # Triton passes floats as float32, which would round alpha / r before the float64 sum.
    exact_scale = torch.tensor([scale], dtype=torch.float64, device=w.device)
    merge_rows_launch(w, w_scale, a, b, exact_scale, out, out_scale).run(w.device)
    return out, out_scale
