"""d_s = scale * d_y @ B and d_b = scale * d_y.T @ s in one read of d_y.

A program takes a tile of features of one slice of tokens: its share of d_s is a part of a sum over features, its
d_b a part of a sum over tokens. The last program to arrive adds the parts in a fixed order: those of d_s for a span
of tokens at a time, while other programs still read, and those of d_b for a tile of features at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .jit import convert, dot, load_tile, store_tile
from .launch import Launch, cdiv, device_arch, device_name, next_block, operand
from .owners import Owners, arrivals, mixed_arguments, owner_of, slice_of_row, sum_of_own_parts
from .partial import arrives_last, counters, sum_of_parts
from .plan import side_tile
from .tiles import SPAN, Tile


@triton.jit
def _output_reduce_kernel(
    d_y_ptr, stride_d_ym, stride_d_yn,  # [M, N]
    s_ptr, stride_sm, stride_sr,  # [M, R], None where d_b is not wanted
    b_ptr, stride_bn, stride_br,  # [N, R], or [N, sum of ranks]
    d_s_ptr, stride_d_sm, stride_d_sr,  # [M, R] or None
    d_b_ptr, stride_d_bn, stride_d_br,  # as b, or None
    d_s_part_ptr, stride_d_s_part,  # [tiles of N, M, R] float32
    d_b_part_ptr, stride_d_b_part,  # [slices, N, R] float32
    counter_ptr,  # [(E + 1) * tiles of N + spans] int32
    rows_ptr, first_ptr,  # [B] and [E + 2] where rows of the batch have adapters of their own, else None
    scale,  # a number, or [E + 1]
    M, N, R, B, E, row_tokens, slice_tokens,
    SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = d_y_ptr.dtype.element_ty
    pid_n, part, tiles, slices = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    first_n, first_m, rank = pid_n * BLOCK_N, part * slice_tokens, R
    end_m = tl.minimum(first_m + slice_tokens, M)
    # Spans count behind the tiles of every adapter and of none.
    span_counter_ptr = counter_ptr + (E + 1) * tiles + part * (slice_tokens // SPAN)
    if rows_ptr is not None:
        row, first_m, end_m = slice_of_row(part, slice_tokens, row_tokens)
        owner = owner_of(rows_ptr, row, True, E)
        first_r = tl.load(first_ptr + owner)
        rank, scale = tl.load(first_ptr + owner + 1) - first_r, tl.load(scale + owner)
        end_m = tl.where(rank > 0, end_m, first_m)
        b_ptr += first_r.to(tl.int64) * stride_br
        counter_ptr += owner * tiles
    offs_n, offs_r = first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    if d_s_ptr is not None:
        d_s_part = d_s_part_ptr + pid_n.to(tl.int64) * stride_d_s_part
        b = convert(load_tile(b_ptr, stride_bn, stride_br, first_n, 0, N, rank, BLOCK_N, BLOCK_R, False), dtype)
    d_b = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for span in range(first_m, end_m, SPAN):
        for m in range(span, tl.minimum(span + SPAN, end_m), BLOCK_M):
            d_y = load_tile(d_y_ptr, stride_d_ym, stride_d_yn, m, first_n, end_m, N, BLOCK_M, BLOCK_N, False)
            if d_b_ptr is not None:
                s = load_tile(s_ptr, stride_sm, stride_sr, m, 0, end_m, rank, BLOCK_M, BLOCK_R, False)
                d_b = dot(tl.trans(d_y), s, d_b)
            if d_s_ptr is not None:
                d_s = dot(d_y, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
                store_tile(d_s_part, R, 1, m, 0, end_m, R, d_s, BLOCK_M, BLOCK_R, False)
        if d_s_ptr is not None:  # noqa: SIM102, known when compiled, as the other is not
            if arrives_last(span_counter_ptr + (span - first_m) // SPAN, tiles):
                for m in range(span, tl.minimum(span + SPAN, end_m), BLOCK_M):
                    offs_m = m + tl.arange(0, BLOCK_M)
                    inside = (offs_m < end_m)[:, None] & (offs_r < R)[None, :]
                    parts = d_s_part_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
                    d_s = sum_of_parts(parts, stride_d_s_part, tiles, inside, BLOCK_M, BLOCK_R)
                    d_s = convert(d_s * scale, dtype)
                    store_tile(d_s_ptr, stride_d_sm, stride_d_sr, m, 0, end_m, R, d_s, BLOCK_M, BLOCK_R, False)
    if d_b_ptr is not None:
        inside = (offs_n < N)[:, None] & (offs_r < rank)[None, :]
        d_b_part = d_b_part_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :]
        tl.store(d_b_part + part.to(tl.int64) * stride_d_b_part, d_b, inside)
        if rows_ptr is not None:
            d_b_ptr += first_r.to(tl.int64) * stride_d_br
            row_slices = tl.cdiv(row_tokens, slice_tokens)
            slices = arrivals(rows_ptr, owner, row_slices, B, E)
        if arrives_last(counter_ptr + pid_n, slices):
            if rows_ptr is not None:
                d_b = sum_of_own_parts(
                    d_b_part, stride_d_b_part, rows_ptr, owner, row_slices, B, E, inside, BLOCK_N, BLOCK_R
                )  # fmt: skip
            else:
                d_b = sum_of_parts(d_b_part, stride_d_b_part, slices, inside, BLOCK_N, BLOCK_R)
            d_b = convert(d_b * scale, d_b_ptr.dtype.element_ty)
            store_tile(d_b_ptr, stride_d_bn, stride_d_br, first_n, 0, N, rank, d_b, BLOCK_N, BLOCK_R, False)


def output_reduce_launch(
    d_y: Tensor, s: Tensor | None, b: Tensor, scale: float, d_s: Tensor | None, d_b: Tensor | None, arch: int | None,
    tile: Tile | None = None, owners: Owners | None = None,
) -> Launch:  # fmt: skip
    """`d_s` and `d_b` are computed where they are given."""
    (M, N), R = d_y.shape, b.shape[1] if owners is None else owners.rank
    block_r = next_block(R)
    tile = tile or side_tile("output_reduce", arch, d_y.dtype, M, N, R, 0.0, device_name(d_y.device))
    tiles, slice_tokens = cdiv(N, tile.block_n), SPAN * tile.splits
    slices, B, counts = max(1, cdiv(M, slice_tokens)), 0, tiles
    if owners is not None:
        slice_tokens = min(slice_tokens, max(1, cdiv(owners.row_tokens, SPAN)) * SPAN)
        slices, B, counts = owners.slices(slice_tokens), owners.rows.shape[0], (len(owners.ranks) + 1) * tiles
    d_s_part = None if d_s is None else torch.empty(tiles, M, R, dtype=torch.float32, device=d_y.device)
    d_b_part = None if d_b is None else torch.empty(slices, N, R, dtype=torch.float32, device=d_y.device)
    return Launch(
        _output_reduce_kernel,
        (tiles, slices),
        dict(
            **operand("d_y", d_y, "mn"), **operand("s", s, "mr"), **operand("b", b, "nr"),
            **operand("d_s", d_s, "mr"), **operand("d_b", d_b, "nr"),
            d_s_part_ptr=d_s_part, stride_d_s_part=M * R, d_b_part_ptr=d_b_part, stride_d_b_part=N * R,
            counter_ptr=counters(counts + slices * (slice_tokens // SPAN), d_y.device), **mixed_arguments(owners),
            scale=float(scale) if owners is None else owners.adapters.scale,
            M=M, N=N, R=R, B=B, slice_tokens=slice_tokens, SPAN=SPAN,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        flops=2 * M * N * R * ((d_s is not None) + (d_b is not None)),
    )  # fmt: skip


def output_reduce(
    d_y: Tensor, s: Tensor | None, b: Tensor, scale: float, needs_d_s: bool = True, needs_d_b: bool = True,
    owners: Owners | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """`d_s = scale * d_y B` and `d_b = scale * d_y^T s` in one read of d_y.

    Args:
        d_y: `[M, N]`, any strides.
        s: `[M, R]` in the dtype of d_y; needed for d_b only.
        b: `[N, R]`, any float dtype.
        scale: factor of both, applied in float32.
        needs_d_s, needs_d_b: which to compute; the bits of one do not depend on the other.
        owners: where rows of the batch have adapters of their own, as in `expand`; d_s is then undefined where a token
            has none, and d_b zero where an adapter has no rows.

    Returns:
        d_s `[M, R]` in the dtype of d_y, and d_b `[N, R]`, contiguous, in that of b; None for one not needed.
    """
    R, new = (b.shape[1], torch.empty_like) if owners is None else (owners.rank, torch.zeros_like)
    d_s = torch.empty(d_y.shape[0], R, dtype=d_y.dtype, device=d_y.device) if needs_d_s else None
    d_b = new(b, memory_format=torch.contiguous_format) if needs_d_b else None
    output_reduce_launch(d_y, s, b, scale, d_s, d_b, device_arch(d_y.device), owners=owners).run(d_y.device)
    return d_s, d_b
