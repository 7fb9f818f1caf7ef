"""First half of LoRA: s = scale * (x * mask / (1 - p)) @ A.T, in one read of x.

Where few tokens would leave most of a GPU idle, programs share the features of a tile of tokens and add their parts
in a fixed order. The dropped x is the left operand of the product, which takes it from registers.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .jit import convert, dot, dropout_keys, keep_mask, load_tile
from .launch import Launch, cdiv, device_arch, device_name, next_block, operand
from .owners import Owners, mixed_arguments, owner_of, slice_of_row
from .partial import arrives_last, counters, sum_of_parts
from .plan import side_tile
from .tiles import MULTIPROCESSORS, Tile

FEW = 16  # tokens of a row that one small tile holds


@triton.jit
def _shrink_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    a_ptr, stride_ar, stride_ak,  # [R, K]
    s_ptr, stride_sm, stride_sr,  # [M, R]
    part_ptr, stride_part,  # [splits, M, R] float32 where K is split
    counter_ptr,  # [tiles of tokens] int32 where K is split
    seed_ptr,  # [1] int64 or None
    rows_ptr, first_ptr,  # [B] and [E + 2] where rows of the batch have adapters of their own, else None
    scale, threshold,  # numbers, or [E + 1]
    M, K, R, E, row_tokens, k_per_split,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    pid_m, split = tl.program_id(0), tl.program_id(1)
    first_m, end_m, first_r, rank = pid_m * BLOCK_M, M, 0, R
    k_from, k_to = split * k_per_split, tl.minimum((split + 1) * k_per_split, K)
    if rows_ptr is not None:
        row, first_m, end_m = slice_of_row(pid_m, BLOCK_M, row_tokens)
        owner = owner_of(rows_ptr, row, True, E)
        first_r = tl.load(first_ptr + owner)
        rank = tl.load(first_ptr + owner + 1) - first_r
        scale, threshold = tl.load(scale + owner), tl.load(threshold + owner)
        k_to = tl.where(rank > 0, k_to, k_from)
        a_ptr += first_r.to(tl.int64) * stride_ar
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    inside = (offs_m < end_m)[:, None] & (offs_r < R)[None, :]
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(k_from, k_to, BLOCK_K):
        x = load_tile(x_ptr, stride_xm, stride_xk, first_m, k, end_m, K, BLOCK_M, BLOCK_K, False)
        if seed_ptr is not None:
            offs_k = k + tl.arange(0, BLOCK_K)
            keep = keep_mask(key_1, key_2, offs_m[:, None], offs_k[None, :], (K + 1) // 2, threshold)
            x = tl.where(keep, x, 0.0).to(dtype)
        a = load_tile(a_ptr, stride_ar, stride_ak, 0, k, rank, K, BLOCK_R, BLOCK_K, False)
        acc = dot(x, tl.trans(convert(a, dtype)), acc)
    if SPLITS > 1:
        part_tile = part_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        tl.store(part_tile + split.to(tl.int64) * stride_part, acc, inside)
        if arrives_last(counter_ptr + pid_m, SPLITS):
            acc = sum_of_parts(part_tile, stride_part, SPLITS, inside, BLOCK_M, BLOCK_R)
            s_tile = s_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :] * stride_sr
            tl.store(s_tile, convert(acc * scale, dtype), inside)
    else:
        s_tile = s_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :] * stride_sr
        tl.store(s_tile, convert(acc * scale, dtype), inside)


def shrink_launch(
    x: Tensor, a: Tensor, p: float, seed: Tensor | None, scale: float, s: Tensor, arch: int | None,
    tile: Tile | None = None, owners: Owners | None = None,
) -> Launch:  # fmt: skip
    (M, K), R = x.shape, s.shape[1]
    block_r = next_block(R)
    tile = tile or _tile(arch, x, K, R, p, owners)
    tiles = cdiv(M, tile.block_m) if owners is None else owners.slices(tile.block_m)
    k_per_split = cdiv(cdiv(K, tile.block_c), tile.splits) * tile.block_c
    split = tile.splits > 1
    part = torch.empty(tile.splits, M, R, dtype=torch.float32, device=x.device) if split else None
    return Launch(
        _shrink_kernel,
        (tiles, tile.splits),
        dict(
            **operand("x", x, "mk"), **operand("a", a, "rk"), **operand("s", s, "mr"),
            part_ptr=part, stride_part=M * R, counter_ptr=counters(tiles, x.device) if split else None,
            seed_ptr=seed if p > 0 else None, **mixed_arguments(owners),
            scale=scale / (1.0 - p) if owners is None else owners.adapters.inverse_keep,
            threshold=drop_threshold(p) if owners is None else owners.adapters.threshold,
            M=M, K=K, R=R, k_per_split=k_per_split,
            SPLITS=tile.splits, BLOCK_M=tile.block_m, BLOCK_K=tile.block_c, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        flops=2 * M * K * R,
    )  # fmt: skip


def _tile(arch: int | None, x: Tensor, K: int, R: int, p: float, owners: Owners | None) -> Tile:
    """With owners, tiles as long as a row at most, and splits as all of them leave multiprocessors idle."""
    few = owners is not None and owners.row_tokens <= FEW
    tokens = owners.row_tokens if owners is not None and few else x.shape[0]
    tile = side_tile("shrink", arch, x.dtype, tokens, K, R, p, device_name(x.device))
    if owners is None or not few:
        return tile
    most = max(1, MULTIPROCESSORS // owners.rows.shape[0])
    return replace(tile, splits=min(tile.splits, 1 << (most.bit_length() - 1)))


def shrink(
    x: Tensor, a: Tensor, p: float = 0.0, seed: Tensor | None = None, scale: float = 1.0, owners: Owners | None = None
) -> Tensor:
    """`scale * (x * mask / (1 - p)) A^T` in one read of x.

    Args:
        x: `[M, K]`, any strides.
        a: `[R, K]`, any strides and float dtype; the backward's `d_s` is `shrink(d_y, b.T, scale=scale)`.
        p, seed: dropout of x, as in `reference.dropout_mask`; `seed` may be None where p is 0.
        scale: factor of the result, applied in float32.
        owners: where rows of the batch have adapters of their own, whose ranks a holds side by side; dropout is then
            by their probabilities, of which p is the largest, and scale is not applied.

    Returns:
        `[M, R]` in the dtype of x; with owners, each token's own ranks first, then zeros up to the largest rank.
    """
    R = a.shape[0] if owners is None else owners.rank
    s = torch.empty(x.shape[0], R, dtype=x.dtype, device=x.device)
    shrink_launch(x, a, p, seed, scale, s, device_arch(x.device), owners=owners).run(x.device)
    return s
