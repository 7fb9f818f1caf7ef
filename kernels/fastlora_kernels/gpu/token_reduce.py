"""out = scale * left.T @ (right * mask), a sum over tokens, in one read of `right`.

Programs share the tokens in slices and add their float32 parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .jit import convert, dot, dropout_keys, keep_mask, load_tile
from .launch import Launch, cdiv, device_arch, device_name, next_block, operand, without_spills
from .owners import Owners, arrivals, mixed_arguments, owner_of, slice_of_row, sum_of_own_parts
from .partial import arrives_last, counters, sum_of_parts
from .plan import side_tile
from .tiles import Tile


@triton.jit
def _token_reduce_kernel(
    left_ptr, stride_leftm, stride_leftr,  # [M, R]
    right_ptr, stride_rightm, stride_rightc,  # [M, C]
    out_ptr, stride_outr, stride_outc,  # [R, C], or [sum of ranks, C]
    part_ptr, stride_part,  # [slices, R, C] float32 where there are several
    counter_ptr,  # [(E + 1) * tiles of C] int32 where there are several slices
    seed_ptr,  # [1] int64 or None
    rows_ptr, first_ptr,  # [B] and [E + 2] where rows of the batch have adapters of their own, else None
    scale, threshold,  # numbers, or [E + 1]
    M, C, R, B, E, row_tokens, slice_tokens,
    SLICED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = left_ptr.dtype.element_ty
    pid_c, part = tl.program_id(0), tl.program_id(1)
    first_c, slices = pid_c * BLOCK_C, tl.num_programs(1)
    first_m, end_m, rank = part * slice_tokens, tl.minimum((part + 1) * slice_tokens, M), R
    if rows_ptr is not None:
        row, first_m, end_m = slice_of_row(part, slice_tokens, row_tokens)
        owner = owner_of(rows_ptr, row, True, E)
        first_r = tl.load(first_ptr + owner)
        rank = tl.load(first_ptr + owner + 1) - first_r
        scale, threshold = tl.load(scale + owner), tl.load(threshold + owner)
        end_m = tl.where(rank > 0, end_m, first_m)
        out_ptr += first_r.to(tl.int64) * stride_outr
        counter_ptr += owner * tl.num_programs(0)
    offs_c, offs_r = first_c + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    inside = (offs_r < rank)[:, None] & (offs_c < C)[None, :]
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(first_m, end_m, BLOCK_M):
        left = load_tile(left_ptr, stride_leftm, stride_leftr, m, 0, end_m, rank, BLOCK_M, BLOCK_R, False)
        right = load_tile(right_ptr, stride_rightm, stride_rightc, m, first_c, end_m, C, BLOCK_M, BLOCK_C, False)
        if seed_ptr is not None:
            offs_m = m + tl.arange(0, BLOCK_M)
            keep = keep_mask(key_1, key_2, offs_m[:, None], offs_c[None, :], (C + 1) // 2, threshold)
            right = tl.where(keep, right, 0.0).to(dtype)
        acc = dot(tl.trans(left), right, acc)
    out_tile = out_ptr + offs_r[:, None].to(tl.int64) * stride_outr + offs_c[None, :].to(tl.int64) * stride_outc
    if SLICED:
        part_tile = part_ptr + offs_r[:, None].to(tl.int64) * C + offs_c[None, :]
        tl.store(part_tile + part.to(tl.int64) * stride_part, acc, inside)
        if rows_ptr is not None:
            row_slices = tl.cdiv(row_tokens, slice_tokens)
            slices = arrivals(rows_ptr, owner, row_slices, B, E)
        if arrives_last(counter_ptr + pid_c, slices):
            if rows_ptr is not None:
                acc = sum_of_own_parts(
                    part_tile, stride_part, rows_ptr, owner, row_slices, B, E, inside, BLOCK_R, BLOCK_C
                )  # fmt: skip
            else:
                acc = sum_of_parts(part_tile, stride_part, slices, inside, BLOCK_R, BLOCK_C)
            tl.store(out_tile, convert(acc * scale, out_ptr.dtype.element_ty), inside)
    else:
        tl.store(out_tile, convert(acc * scale, out_ptr.dtype.element_ty), inside)


def token_reduce_launch(
    left: Tensor, right: Tensor, scale: float, p: float, seed: Tensor | None, out: Tensor, arch: int | None,
    tile: Tile | None = None, owners: Owners | None = None,
) -> Launch:  # fmt: skip
    (M, R), C = left.shape, right.shape[1]
    block_r = next_block(R)
    tile = tile or side_tile("token_reduce", arch, left.dtype, M, C, R, p, device_name(left.device))
    slice_tokens = max(1, cdiv(cdiv(M, tile.block_m), tile.splits)) * tile.block_m
    slices, tiles = max(1, cdiv(M, slice_tokens)), cdiv(C, tile.block_n)
    B, counts = 0, tiles
    if owners is not None:
        slices, B, counts = owners.slices(slice_tokens), owners.rows.shape[0], tiles * (len(owners.ranks) + 1)
    sliced = slices > 1
    part = torch.empty(slices, R, C, dtype=torch.float32, device=left.device) if sliced else None
    return Launch(
        _token_reduce_kernel,
        (tiles, slices),
        dict(
            **operand("left", left, "mr"), **operand("right", right, "mc"), **operand("out", out, "rc"),
            part_ptr=part, stride_part=R * C, counter_ptr=counters(counts, left.device) if sliced else None,
            seed_ptr=seed if p > 0 else None, **mixed_arguments(owners),
            scale=scale / (1.0 - p) if owners is None else owners.adapters.inverse_keep,
            threshold=drop_threshold(p) if owners is None else owners.adapters.threshold, M=M, C=C, R=R, B=B,
            slice_tokens=slice_tokens, SLICED=sliced, BLOCK_M=tile.block_m, BLOCK_C=tile.block_n, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ) | without_spills(arch),
        flops=2 * M * C * R,
    )  # fmt: skip


def token_reduce(
    left: Tensor, right: Tensor, scale: float = 1.0, p: float = 0.0, seed: Tensor | None = None,
    out: Tensor | None = None, owners: Owners | None = None,
) -> Tensor:  # fmt: skip
    """`scale * left^T (right * mask / (1 - p))`: `d_a = token_reduce(d_s, x, 1, p, seed)`.

    Args:
        left: `[M, R]`, any strides.
        right: `[M, C]` in the dtype of left, any strides.
        scale: factor of the result, applied in float32.
        p, seed: dropout of `right`, as in `reference.dropout_mask`; `seed` may be None where p is 0.
        out: `[R, C]`, any float dtype and strides, written; None for a new float32 tensor.
        owners: where rows of the batch have adapters of their own, as in `shrink`; `out` is then `[sum of ranks, C]`
            and written where an adapter has rows.

    Returns:
        `[R, C]`.
    """
    if out is None:
        out = torch.empty(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    token_reduce_launch(left, right, scale, p, seed, out, device_arch(left.device), owners=owners).run(left.device)
    return out
