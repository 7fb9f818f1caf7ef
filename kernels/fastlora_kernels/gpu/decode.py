"""A LoRA linear for a few tokens in one launch: the weight streams once, several programs share the features.

Each program adds its own features' share of the low-rank part, which is linear in x, and stores a float32 part; the
last to arrive at a tile adds the parts in a fixed order. Where s is given, programs share its ranks instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .descriptors import described
from .jit import convert, dot, load_tile, store_tile
from .launch import Launch, cdiv, next_block, operand
from .linear import products
from .low_rank import low_rank, of_owner
from .owners import Owners, mixed_arguments, rank_span, token_owners
from .partial import arrives_last, counters, sum_of_parts
from .tiles import Tile


@triton.jit
def _decode_kernel(
    x_ref, stride_xm, stride_xk,  # [M, K]
    w_ref, stride_wn, stride_wk,  # [N, K]
    w_scale_ptr,  # [N] where W is int8
    bias_ptr,  # [N] or None
    a_ptr, stride_ar, stride_ak,  # [R, K] or None
    b_ptr, stride_bn, stride_br,  # [N, R] or None
    s_ptr, stride_sm, stride_sr,  # [M, R] or None
    y_ptr, stride_ym, stride_yn,  # [M, N]
    y_part_ptr, s_part_ptr,  # [splits, N, M] and [splits, R, M] float32
    counter_ptr,  # [tiles of N] int32
    seed_ptr,  # [1] int64 or None
    rows_ptr, first_ptr,  # [B] and [E + 2] where rows of the batch have adapters of their own, else None
    scale,  # a number, or [E + 1]
    inverse_keep, threshold, M, N, K, R, E, row_tokens, k_per_split,
    RANK_SPAN: tl.constexpr, SPLITS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    pid_n, split = tl.program_id(0), tl.program_id(1)
    first_n, k_from = pid_n * BLOCK_N, split * k_per_split
    offs_m, offs_n, offs_r = tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    mask_m, mask_n, mask_r = offs_m < M, offs_n < N, offs_r < R
    y_sum = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    s_sum = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    y_sum, s_sum = products(
        x_ref, stride_xm, stride_xk, w_ref, stride_wn, stride_wk, a_ptr, stride_ar, stride_ak, seed_ptr, y_sum,
        s_sum, 0, first_n, k_from, tl.minimum(k_from + k_per_split, K), threshold, M, N, K, R, dtype, TMA,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip
    if w_scale_ptr is not None:
        y_sum *= tl.load(w_scale_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
    if a_ptr is not None:
        s_sum *= inverse_keep
        b = load_tile(b_ptr, stride_bn, stride_br, first_n, 0, N, R, BLOCK_N, BLOCK_R, False)
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        y_sum += scale * dot(convert(b, dtype), convert(s_sum, dtype), zero)
    elif s_ptr is not None:
        owner = None
        if rows_ptr is not None:
            owner = token_owners(rows_ptr, 0, M, E, row_tokens, BLOCK_M)
        added = low_rank(
            b_ptr, stride_bn, stride_br, s_ptr, stride_sm, stride_sr, first_ptr, owner,
            tl.zeros((BLOCK_N, BLOCK_M), tl.float32), first_n, 0, split, N, M, R, dtype, RANK_SPAN, SPLITS,
            BLOCK_N, BLOCK_M, BLOCK_R,
        )  # fmt: skip
        y_sum += added * of_owner(scale, owner, first_ptr)
    last = True
    if SPLITS > 1:
        inside, inside_s = mask_n[:, None] & mask_m[None, :], mask_r[:, None] & mask_m[None, :]
        y_part, s_part = y_part_ptr + offs_n[:, None] * M + offs_m[None, :], s_part_ptr
        tl.store(y_part + split.to(tl.int64) * N * M, y_sum, inside)
        if a_ptr is not None:
            s_part += offs_r[:, None] * M + offs_m[None, :]
            tl.store(s_part + split.to(tl.int64) * R * M, s_sum, inside_s & (pid_n == 0))
        last = arrives_last(counter_ptr + pid_n, SPLITS)
        if last:
            y_sum = sum_of_parts(y_part, N * M, SPLITS, inside, BLOCK_N, BLOCK_M)
            if a_ptr is not None:
                s_sum = sum_of_parts(s_part, R * M, SPLITS, inside_s & (pid_n == 0), BLOCK_R, BLOCK_M)
    if last:
        if bias_ptr is not None:
            y_sum += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
        y = tl.trans(convert(y_sum, dtype))
        store_tile(y_ptr, stride_ym, stride_yn, 0, first_n, M, N, y, BLOCK_M, BLOCK_N, False)
        if a_ptr is not None:  # noqa: SIM102, known when compiled, as the other is not
            if pid_n == 0:
                s = tl.trans(convert(s_sum, dtype))
                store_tile(s_ptr, stride_sm, stride_sr, 0, 0, M, R, s, BLOCK_M, BLOCK_R, False)


def decode_launch(
    x: Tensor, w: Tensor, w_scale: Tensor | None, bias: Tensor | None, a: Tensor | None, b: Tensor | None,
    s: Tensor | None, scale: float, p: float, seed: Tensor | None, y: Tensor, arch: int | None, tile: Tile,
    owners: Owners | None = None,
) -> Launch:  # fmt: skip
    """`s` is read where `a` is None, and written where it is not; the low-rank part needs `b` and `s`.

    Raises:
        ValueError: more tokens than one tile holds.
    """
    if x.shape[0] > tile.block_m:
        raise ValueError(f"x: expected up to {tile.block_m} tokens for a decode plan, found {x.shape[0]}")
    (M, K), N, R = x.shape, w.shape[0], 0 if s is None else s.shape[1]
    block_r = next_block(R) if owners is None else owners.block_r
    tiles, split = cdiv(N, tile.block_n), tile.splits > 1
    x_ref, w_ref, tma = described(tile, arch, x, (tile.block_m, tile.block_c), w, (tile.block_n, tile.block_c))
    y_part = torch.empty(tile.splits, N, M, dtype=torch.float32, device=x.device) if split else None
    s_part = torch.empty(tile.splits, R, M, dtype=torch.float32, device=x.device) if split and a is not None else None
    return Launch(
        _decode_kernel,
        (tiles, tile.splits),
        dict(
            x_ref=x_ref, stride_xm=x.stride(0), stride_xk=x.stride(1),
            w_ref=w_ref, stride_wn=w.stride(0), stride_wk=w.stride(1), w_scale_ptr=w_scale, bias_ptr=bias,
            **operand("a", a, "rk"), **operand("b", b, "nr"), **operand("s", s, "mr"), **operand("y", y, "mn"),
            y_part_ptr=y_part, s_part_ptr=s_part, counter_ptr=counters(tiles, x.device) if split else None,
            seed_ptr=seed if p > 0 else None, **mixed_arguments(owners),
            scale=float(scale) if owners is None else owners.adapters.scale, inverse_keep=1.0 / (1.0 - p),
            threshold=drop_threshold(p), M=M, N=N, K=K, R=R,
            k_per_split=cdiv(cdiv(K, tile.block_c), tile.splits) * tile.block_c,
            RANK_SPAN=rank_span(R, block_r, owners), SPLITS=tile.splits, TMA=tma,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_c, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        flops=2 * M * (N * K + (N * R if a is None else tile.splits * N * R + tiles * K * R)),
    )  # fmt: skip
