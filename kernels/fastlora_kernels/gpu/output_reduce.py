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
from .launch import Launch, device_arch, device_name, next_block, operand
from .partial import arrives_last, counters, sum_of_parts
from .plan import side_tile
from .tiles import SPAN, Tile


@triton.jit
def _output_reduce_kernel(
    d_y_ptr, stride_d_ym, stride_d_yn,  # [M, N]
    s_ptr, stride_sm, stride_sr,  # [M, R], None where d_b is not wanted
    b_ptr, stride_bn, stride_br,  # [N, R]
    d_s_ptr, stride_d_sm, stride_d_sr,  # [M, R] or None
    d_b_ptr, stride_d_bn, stride_d_br,  # [N, R] or None
    d_s_part_ptr, stride_d_s_part,  # [tiles of N, M, R] float32
    d_b_part_ptr, stride_d_b_part,  # [slices, N, R] float32
    counter_ptr,  # [tiles of N + spans of M] int32
    scale, M, N, R, slice_tokens,
    SPAN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = d_y_ptr.dtype.element_ty
    pid_n, part, tiles, slices = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    first_n, first_m = pid_n * BLOCK_N, part * slice_tokens
    offs_n, offs_r = first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    if d_s_ptr is not None:
        d_s_part = d_s_part_ptr + pid_n.to(tl.int64) * stride_d_s_part
        b = convert(load_tile(b_ptr, stride_bn, stride_br, first_n, 0, N, R, BLOCK_N, BLOCK_R, False), dtype)
    d_b = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for span in range(first_m, tl.minimum(first_m + slice_tokens, M), SPAN):
        for m in range(span, tl.minimum(span + SPAN, M), BLOCK_M):
            d_y = load_tile(d_y_ptr, stride_d_ym, stride_d_yn, m, first_n, M, N, BLOCK_M, BLOCK_N, False)
            if d_b_ptr is not None:
                s = load_tile(s_ptr, stride_sm, stride_sr, m, 0, M, R, BLOCK_M, BLOCK_R, False)
                d_b = dot(tl.trans(d_y), s, d_b)
            if d_s_ptr is not None:
                d_s = dot(d_y, b, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
                store_tile(d_s_part, R, 1, m, 0, M, R, d_s, BLOCK_M, BLOCK_R, False)
        if d_s_ptr is not None:  # noqa: SIM102, known when compiled, as the other is not
            if arrives_last(counter_ptr + tiles + span // SPAN, tiles):
                for m in range(span, tl.minimum(span + SPAN, M), BLOCK_M):
                    offs_m = m + tl.arange(0, BLOCK_M)
                    inside = (offs_m < M)[:, None] & (offs_r < R)[None, :]
                    parts = d_s_part_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
                    d_s = sum_of_parts(parts, stride_d_s_part, tiles, inside, BLOCK_M, BLOCK_R)
                    d_s = convert(d_s * scale, dtype)
                    store_tile(d_s_ptr, stride_d_sm, stride_d_sr, m, 0, M, R, d_s, BLOCK_M, BLOCK_R, False)
    if d_b_ptr is not None:
        inside = (offs_n < N)[:, None] & (offs_r < R)[None, :]
        d_b_part = d_b_part_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :]
        tl.store(d_b_part + part.to(tl.int64) * stride_d_b_part, d_b, inside)
        if arrives_last(counter_ptr + pid_n, slices):
            d_b = sum_of_parts(d_b_part, stride_d_b_part, slices, inside, BLOCK_N, BLOCK_R) * scale
            d_b = convert(d_b, d_b_ptr.dtype.element_ty)
            store_tile(d_b_ptr, stride_d_bn, stride_d_br, first_n, 0, N, R, d_b, BLOCK_N, BLOCK_R, False)


def output_reduce_launch(
    d_y: Tensor, s: Tensor | None, b: Tensor, scale: float, d_s: Tensor | None, d_b: Tensor | None, arch: int | None,
    tile: Tile | None = None,
) -> Launch:  # fmt: skip
    """`d_s` and `d_b` are computed where they are given."""
    (M, N), R = d_y.shape, b.shape[1]
    block_r = next_block(R)
    tile = tile or side_tile("output_reduce", arch, d_y.dtype, M, N, R, 0.0, device_name(d_y.device))
    tiles, slice_tokens = triton.cdiv(N, tile.block_n), SPAN * tile.splits
    slices = max(1, triton.cdiv(M, slice_tokens))
    d_s_part = None if d_s is None else torch.empty(tiles, M, R, dtype=torch.float32, device=d_y.device)
    d_b_part = None if d_b is None else torch.empty(slices, N, R, dtype=torch.float32, device=d_y.device)
    return Launch(
        _output_reduce_kernel,
        (tiles, slices),
        dict(
            **operand("d_y", d_y, "mn"), **operand("s", s, "mr"), **operand("b", b, "nr"),
            **operand("d_s", d_s, "mr"), **operand("d_b", d_b, "nr"),
            d_s_part_ptr=d_s_part, stride_d_s_part=M * R, d_b_part_ptr=d_b_part, stride_d_b_part=N * R,
            counter_ptr=counters(tiles + triton.cdiv(M, SPAN), d_y.device), scale=float(scale),
            M=M, N=N, R=R, slice_tokens=slice_tokens, SPAN=SPAN,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        flops=2 * M * N * R * ((d_s is not None) + (d_b is not None)),
    )  # fmt: skip


def output_reduce(
    d_y: Tensor, s: Tensor | None, b: Tensor, scale: float, needs_d_s: bool = True, needs_d_b: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """`d_s = scale * d_y B` and `d_b = scale * d_y^T s` in one read of d_y.

    Args:
        d_y: `[M, N]`, any strides.
        s: `[M, R]` in the dtype of d_y; needed for d_b only.
        b: `[N, R]`, any float dtype.
        scale: factor of both, applied in float32.
        needs_d_s, needs_d_b: which to compute; the bits of one do not depend on the other.

    Returns:
        d_s `[M, R]` in the dtype of d_y, and d_b `[N, R]`, contiguous, in that of b; None for one not needed.
    """
    d_s = torch.empty(d_y.shape[0], b.shape[1], dtype=d_y.dtype, device=d_y.device) if needs_d_s else None
    d_b = torch.empty_like(b, memory_format=torch.contiguous_format) if needs_d_b else None
    output_reduce_launch(d_y, s, b, scale, d_s, d_b, device_arch(d_y.device)).run(d_y.device)
    return d_s, d_b
