"""y = x @ W.T + bias + scale * s @ B.T with s = dropout(x) @ A.T, in one pass over x and W.

The product is formed transposed, `y.T = W @ x.T`: an int8 W converted in registers can be the left operand of the
matrix unit as it stands, where as a right operand it would travel back through shared memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .jit import convert, dot, dropout_keys, keep_mask
from .launch import Launch, check_rank, device_arch, next_block
from .tiles import MAX_RANK, linear_tile


@triton.jit
def _lora_linear_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    w_ptr, stride_wn, stride_wk,  # [N, K]
    w_scale_ptr,  # [N] where W is int8
    bias_ptr,  # [N] or None
    a_ptr, stride_ar, stride_ak,  # [R, K]
    b_ptr, stride_bn, stride_br,  # [N, R]
    y_ptr, stride_ym, stride_yn,  # [M, N]
    s_ptr, stride_sm, stride_sr,  # [M, R]
    seed_ptr,  # [1] int64 or None
    scale, inverse_keep, threshold, M, N, K, R,
    HAS_LORA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    num_m = tl.cdiv(M, BLOCK_M)
    pid_m = tl.program_id(0) % num_m
    pid_n = tl.program_id(0) // num_m
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    x_columns = x_ptr + offs_m[None, :].to(tl.int64) * stride_xm
    w_rows = w_ptr + offs_n[:, None].to(tl.int64) * stride_wn
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    s_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(x_columns + offs_k[:, None].to(tl.int64) * stride_xk, mask_k[:, None] & mask_m[None, :], other=0.0)
        w = tl.load(w_rows + offs_k[None, :].to(tl.int64) * stride_wk, mask_n[:, None] & mask_k[None, :], other=0)
        acc = dot(convert(w, dtype), x, acc)
        if HAS_LORA:
            a_tile = a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + offs_k[None, :].to(tl.int64) * stride_ak
            a = tl.load(a_tile, mask_r[:, None] & mask_k[None, :], other=0.0)
            if seed_ptr is not None:
                keep = keep_mask(key_1, key_2, offs_m[None, :], offs_k[:, None], (K + 1) // 2, threshold)
                x = tl.where(keep, x, 0.0).to(dtype)
            s_acc = dot(convert(a, dtype), x, s_acc)

    if w_scale_ptr is not None:
        acc *= tl.load(w_scale_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
    if HAS_LORA:
        s = convert(s_acc * inverse_keep, dtype)
        b_tile = b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_tile, mask_n[:, None] & mask_r[None, :], other=0.0)
        acc += scale * dot(convert(b, dtype), s, tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
        if pid_n == 0:
            s_tile = s_ptr + offs_m[None, :].to(tl.int64) * stride_sm + offs_r[:, None] * stride_sr
            tl.store(s_tile, s, mask_r[:, None] & mask_m[None, :])
    y_tile = y_ptr + offs_m[None, :].to(tl.int64) * stride_ym + offs_n[:, None].to(tl.int64) * stride_yn
    tl.store(y_tile, convert(acc, dtype), mask_n[:, None] & mask_m[None, :])


def operand(name: str, tensor: Tensor | None, axes: str) -> dict[str, Any]:
    """The kernel arguments of one 2-D tensor: its pointer and its strides, 0 where there is no tensor."""
    strides = (0, 0) if tensor is None else tensor.stride()
    return {f"{name}_ptr": tensor, f"stride_{name}{axes[0]}": strides[0], f"stride_{name}{axes[1]}": strides[1]}


def lora_linear_launch(
    x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    scale: float, p: float, seed: Tensor | None, y: Tensor, s: Tensor, arch: int | None,
) -> Launch:  # fmt: skip
    M, K = x.shape
    N, R = w.shape[0], s.shape[1]
    block_r = next_block(R)
    tile = linear_tile(arch, x.element_size(), M, block_r)
    return Launch(
        _lora_linear_kernel,
        (triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),),
        dict(
            **operand("x", x, "mk"), **operand("w", w, "nk"), w_scale_ptr=w_scale, bias_ptr=bias,
            **operand("a", a, "rk"), **operand("b", b, "nr"), **operand("y", y, "mn"), **operand("s", s, "mr"),
            seed_ptr=seed if p > 0 else None, scale=float(scale), inverse_keep=1.0 / (1.0 - p),
            threshold=drop_threshold(p), M=M, N=N, K=K, R=R, HAS_LORA=a is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_c, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
    )  # fmt: skip


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
    """Launch `_lora_linear_kernel`; the contract is in `reference.lora_linear`. Rank up to 256."""
    if a is not None:
        check_rank(a.shape[0], MAX_RANK)
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    s = torch.empty(x.shape[0], 0 if a is None else a.shape[0], dtype=x.dtype, device=x.device)
    lora_linear_launch(x, w, w_scale, bias, a, b, scale, p, seed, y, s, device_arch(x.device)).run(x.device)
    return y, s
