"""int8 codes of x and their scale per token, its features with outliers, and s = dropout(x) @ A.T, in one read of x.

A program has some tokens to itself and passes over them twice, the second time out of the cache. It marks the features
in which they have outliers; the last program to arrive writes the marked ones as a list, so that the product can go
through them without the host knowing how many there are. The specification is `reference.quantize_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import INT8_MAX, drop_threshold
from .jit import convert, dot, dropout_keys, keep_mask, load_tile
from .launch import Launch, cdiv, device_arch, next_block, operand
from .partial import arrives_last, counters
from .quantize import quantize_tile
from .tiles import Tile, quantize_shrink_tile

LISTED = 1024  # features at a time, as the list is written
_INT8_MAX = tl.constexpr(float(INT8_MAX))


@dataclass(frozen=True)
class TokenCodes:
    """x in int8.

    Attributes:
        q: int8 `[M, K]`.
        x_scale: float32 `[M]`.
        columns: int32 `[K]`, the features with outliers in the first `count` places, ascending.
        count: int32 `[1]`.
    """

    q: Tensor
    x_scale: Tensor
    columns: Tensor
    count: Tensor

    @classmethod
    def empty(cls, M: int, K: int, device: torch.device) -> TokenCodes:
        q = torch.empty(M, K, dtype=torch.int8, device=device)
        x_scale = torch.empty(M, dtype=torch.float32, device=device)
        columns = torch.empty(K, dtype=torch.int32, device=device)
        return cls(q, x_scale, columns, torch.empty(1, dtype=torch.int32, device=device))


@triton.jit
def is_outlier(x, threshold):
    """Also true of what is no number."""
    return (tl.abs(x.to(tl.float32)) < threshold) == 0


@triton.jit
def _list_marked(flag_ptr, columns_ptr, count_ptr, K, BLOCK: tl.constexpr):
    """The marked features in ascending order, and how many; the marks are taken back."""
    count = 0
    for k in range(0, K, BLOCK):
        offs_k = k + tl.arange(0, BLOCK)
        # Past the first-level cache, which other processors' stores do not reach.
        flags = tl.load(flag_ptr + offs_k, offs_k < K, other=0, cache_modifier=".cg")
        tl.store(columns_ptr + count + tl.cumsum(flags, 0) - 1, offs_k, flags != 0)
        tl.store(flag_ptr + offs_k, tl.zeros((BLOCK,), tl.int32), flags != 0)
        count += tl.sum(flags, 0)
    tl.store(count_ptr, count)


@triton.jit
def _quantize_shrink_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    a_ptr, stride_ar, stride_ak,  # [R, K] or None
    q_ptr, stride_qm, stride_qk,  # [M, K] int8
    x_scale_ptr,  # [M] float32
    s_ptr, stride_sm, stride_sr,  # [M, R]
    columns_ptr,  # [K] int32
    count_ptr,  # [1] int32
    counter_ptr,  # [1 + K] int32: arrivals, and a mark per feature
    seed_ptr,  # [1] int64 or None
    scale, outlier_threshold, threshold, M, K, R,
    LISTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    first_m = tl.program_id(0) * BLOCK_M
    offs_m, offs_r = first_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    absmax = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_xm, stride_xk, first_m, k, M, K, BLOCK_M, BLOCK_K, False)
        outlier = is_outlier(x, outlier_threshold)
        absmax = tl.maximum(absmax, tl.max(tl.where(outlier, 0.0, tl.abs(x.to(tl.float32))), axis=1))
        # Programs that mark the same feature store the same value.
        marked = tl.max(outlier.to(tl.int32), axis=0)
        tl.store(counter_ptr + 1 + offs_k, marked, marked != 0)
        if a_ptr is not None:
            if seed_ptr is not None:
                keep = keep_mask(key_1, key_2, offs_m[:, None], offs_k[None, :], (K + 1) // 2, threshold)
                x = tl.where(keep, x, 0.0).to(dtype)
            a = load_tile(a_ptr, stride_ar, stride_ak, 0, k, R, K, BLOCK_R, BLOCK_K, False)
            acc = dot(x, tl.trans(convert(a, dtype)), acc)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, stride_xm, stride_xk, first_m, k, M, K, BLOCK_M, BLOCK_K, False)
        kept = tl.where(is_outlier(x, outlier_threshold), 0.0, x.to(tl.float32))
        q_tile = q_ptr + offs_m[:, None].to(tl.int64) * stride_qm + offs_k[None, :] * stride_qk
        tl.store(q_tile, quantize_tile(kept, absmax), (offs_m < M)[:, None] & (offs_k < K)[None, :])
    tl.store(x_scale_ptr + offs_m, tl.div_rn(absmax, tl.full((BLOCK_M,), _INT8_MAX, tl.float32)), offs_m < M)
    if a_ptr is not None:
        s_tile = s_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :] * stride_sr
        tl.store(s_tile, convert(acc * scale, dtype), (offs_m < M)[:, None] & (offs_r < R)[None, :])
    if arrives_last(counter_ptr, tl.num_programs(0)):
        _list_marked(counter_ptr + 1, columns_ptr, count_ptr, K, LISTED)


def quantize_shrink_launch(
    x: Tensor, a: Tensor | None, p: float, seed: Tensor | None, threshold: float, codes: TokenCodes,
    s: Tensor | None, arch: int | None, tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """`codes` is written, and `s` where there is an adapter; `threshold` is that of outliers."""
    (M, K), R = x.shape, 0 if a is None else a.shape[0]
    block_r = next_block(R)
    tile = tile or quantize_shrink_tile(arch, x.element_size(), block_r)
    return Launch(
        _quantize_shrink_kernel,
        (cdiv(M, tile.block_m),),
        dict(
            **operand("x", x, "mk"), **operand("a", a, "rk"), **operand("q", codes.q, "mk"),
            x_scale_ptr=codes.x_scale, **operand("s", s, "mr"), columns_ptr=codes.columns, count_ptr=codes.count,
            counter_ptr=counters(1 + K, x.device), seed_ptr=seed if p > 0 else None, scale=1.0 / (1.0 - p),
            outlier_threshold=float(threshold), threshold=drop_threshold(p), M=M, K=K, R=R,
            LISTED=LISTED, BLOCK_M=tile.block_m, BLOCK_K=tile.block_c, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
        ),
        flops=2 * M * K * R,
    )  # fmt: skip


def quantize_shrink(
    x: Tensor, a: Tensor | None, p: float, seed: Tensor | None, threshold: float
) -> tuple[TokenCodes, Tensor]:
    """Codes of x, and `(x * mask / (1 - p)) A^T`.

    Args:
        x: `[M, K]`, any strides.
        a: `[R, K]`, any strides and float dtype, or None.
        p, seed: dropout of x, as in `reference.dropout_mask`; `seed` may be None where p is 0.
        threshold: elements from this magnitude on are outliers, as in `reference.quantize_tokens`.

    Returns:
        the codes, and s `[M, R]` (`[M, 0]` without a) in the dtype of x.
    """
    s = x.new_empty(x.shape[0], 0 if a is None else a.shape[0])
    codes = TokenCodes.empty(x.shape[0], x.shape[1], x.device)
    arch = device_arch(x.device)
    quantize_shrink_launch(x, a, p, seed, threshold, codes, None if a is None else s, arch).run(x.device)
    return codes, s
