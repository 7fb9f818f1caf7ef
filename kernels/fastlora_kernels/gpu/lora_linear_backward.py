"""Gradients of `lora_linear` for x, a and b, from three kernels; the specification is in `reference`.

    d_s = scale * d_y @ B                                  shrink
    d_a = d_s.T @ dropout(x),  d_b = scale * d_y.T @ s     token reduce
    d_x = d_y @ W + mask / (1 - p) * (d_s @ A)             input gradient

Every sum has a fixed order: tokens are reduced in slices of fixed length whose float32 partial sums are then
added, without atomics, so the same inputs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .jit import convert, dot, dropout_keys, keep_mask
from .launch import Launch, check_rank, device_arch, next_block
from .lora_linear import operand
from .tiles import MAX_RANK, linear_tile, shrink_tile, token_reduce_tile

TOKENS_PER_SLICE = 1024


@triton.jit
def _shrink_kernel(
    left_ptr, stride_lm, stride_lc,  # [M, C]
    w_ptr, stride_wc, stride_wr,  # [C, R]
    out_ptr, stride_om, stride_or,  # [M, R]
    scale, M, C, R,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = scale * left @ w."""
    dtype = left_ptr.dtype.element_ty
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        left_tile = left_ptr + offs_m[None, :].to(tl.int64) * stride_lm + offs_c[:, None].to(tl.int64) * stride_lc
        left = tl.load(left_tile, mask_c[:, None] & mask_m[None, :], other=0.0)
        w_tile = w_ptr + offs_c[None, :].to(tl.int64) * stride_wc + offs_r[:, None].to(tl.int64) * stride_wr
        w = tl.load(w_tile, mask_r[:, None] & mask_c[None, :], other=0.0)
        acc = dot(convert(w, dtype), left, acc)
    out_tile = out_ptr + offs_m[None, :].to(tl.int64) * stride_om + offs_r[:, None] * stride_or
    tl.store(out_tile, convert(acc * scale, dtype), mask_r[:, None] & mask_m[None, :])


@triton.jit
def _token_reduce_kernel(
    left_ptr, stride_lm, stride_lr,  # [M, R]
    right_ptr, stride_rm, stride_rc,  # [M, C]
    out_ptr, stride_os, stride_or, stride_oc,  # [slices, R, C] float32
    seed_ptr,  # [1] int64 or None
    scale, threshold, M, C, R,
    SLICE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[slice] = scale * left.T @ (right * mask) over the slice's tokens."""
    first = tl.program_id(1) * SLICE
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_c, mask_r = offs_c < C, offs_r < R
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(first, tl.minimum(first + SLICE, M), BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        left_tile = left_ptr + offs_m[None, :].to(tl.int64) * stride_lm + offs_r[:, None] * stride_lr
        left = tl.load(left_tile, mask_r[:, None] & mask_m[None, :], other=0.0)
        right_tile = right_ptr + offs_m[:, None].to(tl.int64) * stride_rm + offs_c[None, :].to(tl.int64) * stride_rc
        right = tl.load(right_tile, mask_m[:, None] & mask_c[None, :], other=0.0)
        if seed_ptr is not None:
            keep = keep_mask(key_1, key_2, offs_m[:, None], offs_c[None, :], (C + 1) // 2, threshold)
            right = tl.where(keep, right, 0.0).to(right_ptr.dtype.element_ty)
        acc = dot(left, right, acc)
    out_tile = out_ptr + tl.program_id(1).to(tl.int64) * stride_os
    out_tile += offs_r[:, None].to(tl.int64) * stride_or + offs_c[None, :].to(tl.int64) * stride_oc
    tl.store(out_tile, acc * scale, mask_r[:, None] & mask_c[None, :])


@triton.jit
def _input_gradient_kernel(
    d_y_ptr, stride_d_ym, stride_d_yn,  # [M, N]
    w_ptr, stride_wn, stride_wk,  # [N, K]
    w_scale_ptr,  # [N] where W is int8
    d_s_ptr, stride_d_sm, stride_d_sr,  # [M, R]
    a_ptr, stride_ar, stride_ak,  # [R, K]
    d_x_ptr, stride_d_xm, stride_d_xk,  # [M, K]
    seed_ptr,  # [1] int64 or None
    inverse_keep, threshold, M, N, K, R,
    HAS_LORA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """d_x = d_y @ W + mask / (1 - p) * (d_s @ A)."""
    dtype = d_y_ptr.dtype.element_ty
    num_m = tl.cdiv(M, BLOCK_M)
    offs_m = (tl.program_id(0) % num_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = (tl.program_id(0) // num_m) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < M, offs_k < K
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        d_y_tile = d_y_ptr + offs_m[None, :].to(tl.int64) * stride_d_ym + offs_n[:, None].to(tl.int64) * stride_d_yn
        d_y = tl.load(d_y_tile, mask_n[:, None] & mask_m[None, :], other=0.0)
        w_tile = w_ptr + offs_n[None, :].to(tl.int64) * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
        w = tl.load(w_tile, mask_k[:, None] & mask_n[None, :], other=0)
        if w_scale_ptr is not None:
            # The sum runs over n, so the scale cannot wait for the end.
            w_scale = tl.load(w_scale_ptr + offs_n, mask_n, other=0.0).to(tl.float32)
            w = w.to(tl.float32) * w_scale[None, :]
        acc = dot(convert(w, dtype), d_y, acc)
    if HAS_LORA:
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        d_s_tile = d_s_ptr + offs_m[None, :].to(tl.int64) * stride_d_sm + offs_r[:, None] * stride_d_sr
        d_s = tl.load(d_s_tile, mask_r[:, None] & mask_m[None, :], other=0.0)
        a_tile = a_ptr + offs_r[None, :].to(tl.int64) * stride_ar + offs_k[:, None].to(tl.int64) * stride_ak
        a = tl.load(a_tile, mask_k[:, None] & mask_r[None, :], other=0.0)
        low_rank = dot(convert(a, dtype), d_s, tl.zeros((BLOCK_K, BLOCK_M), tl.float32)) * inverse_keep
        if seed_ptr is not None:
            key_1, key_2 = dropout_keys(seed_ptr)
            keep = keep_mask(key_1, key_2, offs_m[None, :], offs_k[:, None], (K + 1) // 2, threshold)
            low_rank = tl.where(keep, low_rank, 0.0)
        acc += low_rank
    d_x_tile = d_x_ptr + offs_m[None, :].to(tl.int64) * stride_d_xm + offs_k[:, None].to(tl.int64) * stride_d_xk
    tl.store(d_x_tile, convert(acc, dtype), mask_k[:, None] & mask_m[None, :])


def shrink_launch(left: Tensor, w: Tensor, scale: float, out: Tensor, arch: int | None) -> Launch:
    (M, C), R = left.shape, w.shape[1]
    block_r = next_block(R)
    tile = shrink_tile(arch, left.element_size(), M, block_r)
    return Launch(
        _shrink_kernel,
        (triton.cdiv(M, tile.block_m),),
        dict(
            left_ptr=left, stride_lm=left.stride(0), stride_lc=left.stride(1), **operand("w", w, "cr"),
            out_ptr=out, stride_om=out.stride(0), stride_or=out.stride(1), scale=float(scale), M=M, C=C, R=R,
            BLOCK_M=tile.block_m, BLOCK_C=tile.block_c, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
    )  # fmt: skip


def token_reduce_launch(
    left: Tensor, right: Tensor, scale: float, p: float, seed: Tensor | None, out: Tensor, arch: int | None
) -> Launch:
    """`out` is `[slices, R, C]` float32, any strides."""
    (M, R), C = left.shape, right.shape[1]
    block_r = next_block(R)
    tile = token_reduce_tile(arch, left.element_size(), block_r)
    return Launch(
        _token_reduce_kernel,
        (triton.cdiv(C, tile.block_n), out.shape[0]),
        dict(
            left_ptr=left, stride_lm=left.stride(0), stride_lr=left.stride(1),
            right_ptr=right, stride_rm=right.stride(0), stride_rc=right.stride(1),
            out_ptr=out, stride_os=out.stride(0), stride_or=out.stride(1), stride_oc=out.stride(2),
            seed_ptr=seed if p > 0 else None, scale=float(scale), threshold=drop_threshold(p), M=M, C=C, R=R,
            SLICE=TOKENS_PER_SLICE, BLOCK_M=tile.block_m, BLOCK_C=tile.block_n, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
    )  # fmt: skip


def input_gradient_launch(
    d_y: Tensor, w: Tensor, w_scale: Tensor | None, d_s: Tensor | None, a: Tensor | None,
    p: float, seed: Tensor | None, d_x: Tensor, arch: int | None,
) -> Launch:  # fmt: skip
    (M, N), K = d_y.shape, w.shape[1]
    R = 0 if a is None else a.shape[0]
    block_r = next_block(R)
    tile = linear_tile(arch, d_y.element_size(), M, block_r)
    return Launch(
        _input_gradient_kernel,
        (triton.cdiv(M, tile.block_m) * triton.cdiv(K, tile.block_n),),
        dict(
            **operand("d_y", d_y, "mn"), **operand("w", w, "nk"), w_scale_ptr=w_scale,
            **operand("d_s", d_s, "mr"), **operand("a", a, "rk"), **operand("d_x", d_x, "mk"),
            seed_ptr=seed if p > 0 else None, inverse_keep=1.0 / (1.0 - p), threshold=drop_threshold(p),
            M=M, N=N, K=K, R=R, HAS_LORA=a is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_c, BLOCK_K=tile.block_n, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
    )  # fmt: skip


def _reduce_tokens(left: Tensor, right: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """`scale * left.T @ (right * mask)` as float32 `[R, C]`."""
    slices = triton.cdiv(left.shape[0], TOKENS_PER_SLICE)
    out = torch.empty(slices, left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    token_reduce_launch(left, right, scale, p, seed, out, device_arch(left.device)).run(left.device)
    return out[0] if slices == 1 else out.sum(dim=0)


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
    """Launch the three kernels; the contract is in `reference.lora_linear_backward`. Rank up to 256."""
    arch, device = device_arch(d_y.device), d_y.device
    d_x, d_a, d_b, d_s = d_y.new_empty(0), d_y.new_empty(0), d_y.new_empty(0), None
    if a is not None and b is not None:
        check_rank(a.shape[0], MAX_RANK)
        if needs_x or needs_a:
            d_s = torch.empty(d_y.shape[0], a.shape[0], dtype=d_y.dtype, device=device)
            shrink_launch(d_y, b, scale, d_s, arch).run(device)
        if needs_a:
            d_a = _reduce_tokens(d_s, x, 1.0 / (1.0 - p), p, seed).to(a.dtype)
        if needs_b:
            d_b = _reduce_tokens(s, d_y, scale, 0.0, None).T.to(b.dtype).contiguous()
    if needs_x:
        d_x = torch.empty(d_y.shape[0], w.shape[1], dtype=d_y.dtype, device=device)
        input_gradient_launch(d_y, w, w_scale, d_s, a, p, seed, d_x, arch).run(device)
    return d_x, d_a, d_b
