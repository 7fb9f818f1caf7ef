"""y = x @ W.T + bias + scale * s @ B.T, where s is given or comes out of the same pass as s = dropout(x) @ A.T.

The product is formed transposed, `y.T = W @ x.T`: an int8 W converted in registers can be the left operand of the
matrix unit as it stands, where as a right operand it would travel back through shared memory. A given s enters the
accumulator before the first product, so that no second accumulator is held.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .descriptors import described
from .jit import convert, dot, dropout_keys, keep_mask, load_tile, store_tile, tile_place
from .launch import Launch, cdiv, device_arch, next_block, operand
from .low_rank import low_rank, of_owner
from .owners import Owners, mixed_arguments, rank_span, token_owners
from .tiles import MAX_BLOCK_R, Tile, linear_tile, programs


@triton.jit
def products(
    x_ref, stride_xm, stride_xk,  # [M, K]
    w_ref, stride_wn, stride_wk,  # [N, K]
    a_ptr, stride_ar, stride_ak,  # [R, K] or None
    seed_ptr,  # [1] int64 or None
    acc, s_acc,  # [BLOCK_N, BLOCK_M] and [BLOCK_R, BLOCK_M] float32
    first_m, first_n, k_from, k_to, threshold, M, N, K, R, dtype: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + W @ x.T and s_acc + A @ dropout(x).T over the features from `k_from` to `k_to`."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    for k in range(k_from, k_to, BLOCK_K):
        x = load_tile(x_ref, stride_xm, stride_xk, first_m, k, M, K, BLOCK_M, BLOCK_K, TMA)
        w = load_tile(w_ref, stride_wn, stride_wk, first_n, k, N, K, BLOCK_N, BLOCK_K, TMA)
        acc = dot(convert(w, dtype), tl.trans(x), acc)
        if a_ptr is not None:
            a = load_tile(a_ptr, stride_ar, stride_ak, 0, k, R, K, BLOCK_R, BLOCK_K, False)
            if seed_ptr is not None:
                offs_k = k + tl.arange(0, BLOCK_K)
                keep = keep_mask(key_1, key_2, offs_m[:, None], offs_k[None, :], (K + 1) // 2, threshold)
                x = tl.where(keep, x, 0.0).to(dtype)
            s_acc = dot(convert(a, dtype), tl.trans(x), s_acc)
    return acc, s_acc


@triton.jit
def _linear_kernel(
    x_ref, stride_xm, stride_xk,  # [M, K]
    w_ref, stride_wn, stride_wk,  # [N, K]
    w_scale_ptr,  # [N] where W is int8
    bias_ptr,  # [N] or None
    a_ptr, stride_ar, stride_ak,  # [R, K] where s is to be computed
    b_ptr, stride_bn, stride_br,  # [N, R] or None
    s_ptr, stride_sm, stride_sr,  # [M, R]
    y_ptr, stride_ym, stride_yn,  # [M, N]
    seed_ptr,  # [1] int64 or None
    rows_ptr, first_ptr,  # [B] and [E + 2] where rows of the batch have adapters of their own, else None
    scale,  # a number, or [E + 1]
    inverse_keep, threshold, M, N, K, R, E, row_tokens,
    RANK_SPAN: tl.constexpr, GIVEN_S: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tile_place(tile, num_m, num_n, GROUP)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        if w_scale_ptr is not None:
            w_scale = tl.load(w_scale_ptr + offs_n, mask_n, other=1.0).to(tl.float32)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        s_acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
        if GIVEN_S:
            owner = None
            if rows_ptr is not None:
                owner = token_owners(rows_ptr, first_m, M, E, row_tokens, BLOCK_M)
            acc = low_rank(
                b_ptr, stride_bn, stride_br, s_ptr, stride_sm, stride_sr, first_ptr, owner, acc, first_n, first_m, 0,
                N, M, R, dtype, RANK_SPAN, 1, BLOCK_N, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            acc *= of_owner(scale, owner, first_ptr)
            if w_scale_ptr is not None:
                # The end multiplies by w_scale; a row whose scale is 0 holds zeros only.
                acc = acc / tl.where(w_scale != 0, w_scale, 1.0)[:, None]
        acc, s_acc = products(
            x_ref, stride_xm, stride_xk, w_ref, stride_wn, stride_wk, a_ptr, stride_ar, stride_ak, seed_ptr, acc,
            s_acc, first_m, first_n, 0, K, threshold, M, N, K, R, dtype, TMA, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
        if w_scale_ptr is not None:
            acc *= (tl.where(w_scale != 0, w_scale, 1.0) if GIVEN_S else w_scale)[:, None]
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
        if a_ptr is not None:
            s = convert(s_acc * inverse_keep, dtype)
            b = load_tile(b_ptr, stride_bn, stride_br, first_n, 0, N, R, BLOCK_N, BLOCK_R, False)
            acc += scale * dot(convert(b, dtype), s, tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
            if pid_n == 0:
                store_tile(s_ptr, stride_sm, stride_sr, first_m, 0, M, R, tl.trans(s), BLOCK_M, BLOCK_R, False)
        y = tl.trans(convert(acc, dtype))
        store_tile(y_ptr, stride_ym, stride_yn, first_m, first_n, M, N, y, BLOCK_M, BLOCK_N, False)


def linear_launch(
    x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    s: Tensor | None, scale: float, p: float, seed: Tensor | None, y: Tensor, arch: int | None,
    tile: Tile | None = None, owners: Owners | None = None,
) -> Launch:  # fmt: skip
    """`s` is read where `a` is None, and written where it is not; the low-rank part needs `b` and `s`."""
    (M, K), N, R = x.shape, w.shape[0], 0 if s is None else s.shape[1]
    block_r = next_block(R) if a is not None else min(next_block(R), MAX_BLOCK_R)
    block_r = block_r if owners is None else owners.block_r
    tile = tile or linear_tile(arch, x.element_size(), M, block_r)
    x_ref, w_ref, tma = described(tile, arch, x, (tile.block_m, tile.block_c), w, (tile.block_n, tile.block_c))
    arguments = dict(
        x_ref=x_ref, stride_xm=x.stride(0), stride_xk=x.stride(1),
        w_ref=w_ref, stride_wn=w.stride(0), stride_wk=w.stride(1), w_scale_ptr=w_scale, bias_ptr=bias,
        **operand("a", a, "rk"), **operand("b", b, "nr"), **operand("s", s, "mr"), **operand("y", y, "mn"),
        seed_ptr=seed if p > 0 else None, **mixed_arguments(owners),
        scale=float(scale) if owners is None else owners.adapters.scale, inverse_keep=1.0 / (1.0 - p),
        threshold=drop_threshold(p), M=M, N=N, K=K, R=R,
        RANK_SPAN=rank_span(R, block_r, owners), GIVEN_S=a is None and b is not None,
        TMA=tma, FLATTEN=tile.persistent and s is None, GROUP=8,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_c, BLOCK_R=block_r,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    tiles_n = cdiv(N, tile.block_n)
    shrink_flops = 0 if a is None else 2 * M * K * R * tiles_n
    grid = programs(tile, cdiv(M, tile.block_m) * tiles_n, x.device)
    return Launch(_linear_kernel, grid, arguments, flops=2 * M * N * (K + R) + shrink_flops)


def expand(
    x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, s: Tensor | None, b: Tensor | None,
    scale: float, out: Tensor | None = None, tile: Tile | None = None, owners: Owners | None = None,
) -> Tensor:  # fmt: skip
    """`y = x W^T + bias + scale * s B^T` for a given s, in one launch and one accumulator.

    Args:
        x: `[M, K]`, any strides. With K = 0 only `bias + scale * s B^T` remains.
        w: `[N, K]`, any strides; in the dtype of x, or int8 with `w_scale`.
        w_scale: `[N]` for an int8 `w`, else None; a row of scale 0 must hold zeros, as `quantize_rows` leaves it.
        bias: `[N]` or None.
        s, b: `[M, R]` in the dtype of x and `[N, R]` in any float dtype; both None for the frozen layer alone.
        scale: the factor of the low-rank part.
        out: `[M, N]` in the dtype of x, any strides, written; None for a new tensor.
        tile: None for a safe one.
        owners: where rows of the batch have adapters of their own, with ranks side by side in b and from column 0 in
            s, and scales in place of `scale`.

    Returns:
        `[M, N]` in the dtype of x.
    """
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device) if out is None else out
    arch = device_arch(x.device)
    linear_launch(x, w, w_scale, bias, None, b, s, scale, 0.0, None, y, arch, tile, owners).run(x.device)
    return y
