"""y = x @ W.T + bias + scale * s @ B.T on int8 tensor cores: codes of x times codes of W, outliers of x apart.

    y = w_scale * (x_scale * (q @ w.T) + outliers @ w.T) + bias + scale * s @ B.T

The features with outliers come as a list from `quantize_shrink`. One accumulator serves everything: the exact sum of
the codes is converted where it lies. The specification is `reference.int8_product`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .descriptors import described
from .jit import convert, dot, load_tile, store_tile, tile_place
from .launch import Launch, cdiv, device_arch, next_block, operand
from .quantize_shrink import TokenCodes, is_outlier, quantize_shrink
from .tiles import Tile, programs

OUTLIERS = 16  # features with outliers at a time
RANKS = 32  # of the low-rank part at a time


@triton.jit
def _int8_linear_kernel(
    q_ref, stride_qm, stride_qk,  # [M, K] int8
    w_ref, stride_wn, stride_wk,  # [N, K] int8
    w_again_ptr, x_again_ptr, stride_xm, stride_xk,  # [N, K] int8 and [M, K], read where a feature has outliers
    x_scale_ptr,  # [M] float32
    w_scale_ptr,  # [N]
    columns_ptr,  # [K] int32
    count_ptr,  # [1] int32
    bias_ptr,  # [N] or None
    s_ptr, stride_sm, stride_sr,  # [M, R] or None
    b_ptr, stride_bn, stride_br,  # [N, R] or None
    y_ptr, stride_ym, stride_yn,  # [M, N]
    scale, outlier_threshold, M, N, K, R,
    RANK_SPAN: tl.constexpr, OUTLIERS: tl.constexpr, TMA: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    unit = tl.where(scale != 0.0, scale, 1.0)
    count = tl.load(count_ptr)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        pid_m, pid_n = tile_place(tile, num_m, num_n, GROUP)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        mask_m, mask_n = offs_m < M, offs_n < N
        codes = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for k in range(0, K, BLOCK_K):
            q = load_tile(q_ref, stride_qm, stride_qk, first_m, k, M, K, BLOCK_M, BLOCK_K, TMA)
            w = load_tile(w_ref, stride_wn, stride_wk, first_n, k, N, K, BLOCK_N, BLOCK_K, TMA)
            codes = tl.dot(q, tl.trans(w), codes, out_dtype=tl.int32)
        acc = codes.to(tl.float32) * tl.load(x_scale_ptr + offs_m, mask_m, other=0.0)[:, None]
        for first in tl.range(0, count, OUTLIERS, num_stages=1):
            places = first + tl.arange(0, OUTLIERS)
            columns = tl.load(columns_ptr + places, places < count, other=0).to(tl.int64)
            x_tile = x_again_ptr + offs_m[:, None].to(tl.int64) * stride_xm + columns[None, :] * stride_xk
            x = tl.load(x_tile, mask_m[:, None] & (places < count)[None, :], other=0.0)
            w_tile = w_again_ptr + offs_n[None, :].to(tl.int64) * stride_wn + columns[:, None] * stride_wk
            w = tl.load(w_tile, mask_n[None, :] & (places < count)[:, None], other=0)
            acc = dot(tl.where(is_outlier(x, outlier_threshold), x, 0.0).to(dtype), convert(w, dtype), acc)
        acc *= tl.load(w_scale_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[None, :]
        if s_ptr is not None:
            # Divided by the scale before and multiplied after, so that no second accumulator is held.
            acc /= unit
            for r in tl.range(0, RANK_SPAN, BLOCK_R, num_stages=1):  # no registers for loads ahead
                s = load_tile(s_ptr, stride_sm, stride_sr, first_m, r, M, R, BLOCK_M, BLOCK_R, False)
                b = load_tile(b_ptr, stride_bn, stride_br, first_n, r, N, R, BLOCK_N, BLOCK_R, False)
                s = tl.where(scale != 0.0, s, 0.0).to(dtype)
                acc = dot(s, tl.trans(convert(b, dtype)), acc)
            acc *= unit
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[None, :]
        y = convert(acc, dtype)
        store_tile(y_ptr, stride_ym, stride_yn, first_m, first_n, M, N, y, BLOCK_M, BLOCK_N, False)


def int8_linear_launch(
    x: Tensor, codes: TokenCodes, w: Tensor, w_scale: Tensor, bias: Tensor | None, s: Tensor | None,
    b: Tensor | None, scale: float, threshold: float, y: Tensor, arch: int | None, tile: Tile,
) -> Launch:  # fmt: skip
    """`y` is written; the low-rank part needs `s` and `b`."""
    (M, K), N, R = x.shape, w.shape[0], 0 if s is None else s.shape[1]
    block_r = min(next_block(R), RANKS)
    q_ref, w_ref, tma = described(
        tile, arch, codes.q, (tile.block_m, tile.block_c), w, (tile.block_n, tile.block_c)
    )  # fmt: skip
    arguments = dict(
        q_ref=q_ref, stride_qm=codes.q.stride(0), stride_qk=codes.q.stride(1),
        w_ref=w_ref, stride_wn=w.stride(0), stride_wk=w.stride(1), w_again_ptr=w,
        x_again_ptr=x, stride_xm=x.stride(0), stride_xk=x.stride(1),
        x_scale_ptr=codes.x_scale, w_scale_ptr=w_scale, columns_ptr=codes.columns, count_ptr=codes.count,
        bias_ptr=bias, **operand("s", s, "mr"), **operand("b", b, "nr"), **operand("y", y, "mn"),
        scale=float(scale), outlier_threshold=float(threshold), M=M, N=N, K=K, R=R,
        RANK_SPAN=cdiv(R, block_r) * block_r, OUTLIERS=OUTLIERS, TMA=tma, GROUP=8,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_c, BLOCK_R=block_r,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    grid = programs(tile, cdiv(M, tile.block_m) * cdiv(N, tile.block_n), x.device)
    return Launch(_int8_linear_kernel, grid, arguments, flops=2 * M * N * (K + R))


def int8_linear(
    tile: Tile, x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    scale: float, p: float, seed: Tensor | None, threshold: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.lora_linear` with a threshold: `w` is int8 and there are more than `FEW_TOKENS` tokens.

    Returns:
        y `[M, N]` and s `[M, R]` in the dtype of x.
    """
    codes, s = quantize_shrink(x, a, p, seed, threshold)
    return int8_expand(tile, x, codes, w, w_scale, bias, None if a is None else s, b, scale, threshold), s


def int8_expand(
    tile: Tile, x: Tensor, codes: TokenCodes, w: Tensor, w_scale: Tensor, bias: Tensor | None, s: Tensor | None,
    b: Tensor | None, scale: float, threshold: float,
) -> Tensor:  # fmt: skip
    """y for given codes and s; both s and b are None for the frozen layer alone."""
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    arch = device_arch(x.device)
    int8_linear_launch(x, codes, w, w_scale, bias, s, b, scale, threshold, y, arch, tile).run(x.device)
    return y
