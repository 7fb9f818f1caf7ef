"""d_x = d_y @ W + mask / (1 - p) * (d_s @ A), formed transposed as in `linear`.

The low-rank part, its mask recomputed, is what the accumulator starts from.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .descriptors import described
from .jit import convert, dot, dropout_keys, keep_mask, load_tile, store_tile, tile_place
from .launch import Launch, cdiv, device_arch, next_block, operand, without_spills
from .low_rank import low_rank, of_owner
from .owners import SMALL_BLOCK_R, Owners, mixed_arguments, rank_span, token_owners
from .tiles import MAX_BLOCK_R, Tile, linear_tile, programs


@triton.jit
def _input_gradient_kernel(
    d_y_ref, stride_d_ym, stride_d_yn,  # [M, N]
    w_ref, stride_wn, stride_wk,  # [N, K]
    w_scale_ptr,  # [N] where W is int8
    d_s_ptr, stride_d_sm, stride_d_sr,  # [M, R] or None
    a_ptr, stride_ar, stride_ak,  # [R, K] or None
    d_x_ptr, stride_d_xm, stride_d_xk,  # [M, K]
    seed_ptr,  # [1] int64 or None
    rows_ptr, first_ptr,  # [B] and [E + 2] where rows of the batch have adapters of their own, else None
    inverse_keep, threshold,  # numbers, or [E + 1]
    M, N, K, R, E, row_tokens,
    RANK_SPAN: tl.constexpr, ACCUMULATE: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = d_x_ptr.dtype.element_ty
    num_m, num_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K)
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    for tile in tl.range(tl.program_id(0), num_m * num_k, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_k = tile_place(tile, num_m, num_k, GROUP)
        first_m, first_k = pid_m * BLOCK_M, pid_k * BLOCK_K
        acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
        if a_ptr is not None:
            owner = None
            if rows_ptr is not None:
                owner = token_owners(rows_ptr, first_m, M, E, row_tokens, BLOCK_M)
            acc = low_rank(
                a_ptr, stride_ak, stride_ar, d_s_ptr, stride_d_sm, stride_d_sr, first_ptr, owner, acc, first_k, first_m,
                0, K, M, R, dtype, RANK_SPAN, 1, BLOCK_K, BLOCK_M, BLOCK_R,
            )  # fmt: skip
            acc *= of_owner(inverse_keep, owner, first_ptr)
            if seed_ptr is not None:
                offs_m, offs_k = first_m + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_K)
                dropped_below = of_owner(threshold, owner, first_ptr)
                keep = keep_mask(key_1, key_2, offs_m[None, :], offs_k[:, None], (K + 1) // 2, dropped_below)
                acc = tl.where(keep, acc, 0.0)
        if ACCUMULATE:
            d_x = load_tile(d_x_ptr, stride_d_xm, stride_d_xk, first_m, first_k, M, K, BLOCK_M, BLOCK_K, False)
            acc += tl.trans(d_x).to(tl.float32)
        for n in range(0, N, BLOCK_N):
            d_y = load_tile(d_y_ref, stride_d_ym, stride_d_yn, first_m, n, M, N, BLOCK_M, BLOCK_N, TMA)
            w = load_tile(w_ref, stride_wn, stride_wk, n, first_k, N, K, BLOCK_N, BLOCK_K, TMA)
            if w_scale_ptr is not None:
                # The sum runs over n, so the scale cannot wait for the end.
                offs_n = n + tl.arange(0, BLOCK_N)
                w = w.to(tl.float32) * tl.load(w_scale_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[:, None]
            acc = dot(tl.trans(convert(w, dtype)), tl.trans(d_y), acc)
        d_x = tl.trans(convert(acc, dtype))
        store_tile(d_x_ptr, stride_d_xm, stride_d_xk, first_m, first_k, M, K, d_x, BLOCK_M, BLOCK_K, False)


def input_gradient_launch(
    d_y: Tensor, w: Tensor, w_scale: Tensor | None, d_s: Tensor | None, a: Tensor | None,
    p: float, seed: Tensor | None, d_x: Tensor, accumulate: bool, arch: int | None, tile: Tile | None = None,
    owners: Owners | None = None,
) -> Launch:  # fmt: skip
    (M, N), K, R = d_y.shape, w.shape[1], 0 if d_s is None else d_s.shape[1]
    block_r = min(next_block(R), MAX_BLOCK_R) if owners is None else SMALL_BLOCK_R
    tile = tile or linear_tile(arch, d_y.element_size(), M, block_r)
    d_y_ref, w_ref, tma = described(tile, arch, d_y, (tile.block_m, tile.block_c), w, (tile.block_c, tile.block_n))
    arguments = dict(
        d_y_ref=d_y_ref, stride_d_ym=d_y.stride(0), stride_d_yn=d_y.stride(1),
        w_ref=w_ref, stride_wn=w.stride(0), stride_wk=w.stride(1), w_scale_ptr=w_scale,
        **operand("d_s", d_s, "mr"), **operand("a", a, "rk"), **operand("d_x", d_x, "mk"),
        seed_ptr=seed if p > 0 else None, **mixed_arguments(owners),
        inverse_keep=1.0 / (1.0 - p) if owners is None else owners.adapters.inverse_keep,
        threshold=drop_threshold(p) if owners is None else owners.adapters.threshold, M=M, N=N, K=K, R=R,
        RANK_SPAN=rank_span(R, block_r, owners), ACCUMULATE=accumulate,
        TMA=tma, FLATTEN=tile.persistent and a is None, GROUP=8,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_c, BLOCK_K=tile.block_n, BLOCK_R=block_r,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    ) | without_spills(arch)  # fmt: skip
    tiles = cdiv(M, tile.block_m) * cdiv(K, tile.block_n)
    return Launch(_input_gradient_kernel, programs(tile, tiles, d_y.device), arguments, flops=2 * M * K * (N + R))


def input_gradient(
    d_y: Tensor, w: Tensor, w_scale: Tensor | None, d_s: Tensor | None, a: Tensor | None,
    p: float = 0.0, seed: Tensor | None = None, out: Tensor | None = None, accumulate: bool = False,
    tile: Tile | None = None, owners: Owners | None = None,
) -> Tensor:  # fmt: skip
    """`d_x = d_y W + mask / (1 - p) * (d_s A)`, added to `out` where `accumulate`.

    Args:
        d_y: `[M, N]`, any strides. With N = 0 only the low-rank part remains.
        w: `[N, K]`, any strides; in the dtype of d_y, or int8 with `w_scale`.
        w_scale: `[N]` for an int8 `w`, else None.
        d_s, a: `[M, R]` in the dtype of d_y and `[R, K]` in any float dtype; both None without an adapter.
        p, seed: the forward's dropout; `seed` may be None where p is 0.
        out: `[M, K]` in the dtype of d_y, any strides, written; None for a new tensor.
        accumulate: adds to what `out` holds, in float32 before the one rounding.
        tile: None for a safe one.
        owners: where rows of the batch have adapters of their own, as in `shrink`.

    Returns:
        `[M, K]` in the dtype of d_y.

    Raises:
        ValueError: `accumulate` without `out`.
    """
    if accumulate and out is None:
        raise ValueError("accumulate: expected out to add to, found None")
    d_x = torch.empty(d_y.shape[0], w.shape[1], dtype=d_y.dtype, device=d_y.device) if out is None else out
    arch = device_arch(d_y.device)
    input_gradient_launch(d_y, w, w_scale, d_s, a, p, seed, d_x, accumulate, arch, tile, owners).run(d_y.device)
    return d_x
