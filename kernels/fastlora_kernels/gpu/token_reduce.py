"""out = scale * left.T @ (right * mask), a sum over tokens, in one read of `right`.

Programs share the tokens in slices and add their float32 parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .jit import dot, dropout_keys, keep_mask, load_tile
from .launch import Launch, device_arch, device_name, next_block, operand
from .partial import counters, store_sum
from .plan import side_tile
from .tiles import Tile


@triton.jit
def _token_reduce_kernel(
    left_ptr, stride_leftm, stride_leftr,  # [M, R]
    right_ptr, stride_rightm, stride_rightc,  # [M, C]
    out_ptr, stride_outr, stride_outc,  # [R, C]
    part_ptr, stride_part,  # [slices, R, C] float32 where there are several
    counter_ptr,  # [tiles of C] int32 where there are several slices
    seed_ptr,  # [1] int64 or None
    scale, threshold, M, C, R, slice_tokens,
    SLICED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = left_ptr.dtype.element_ty
    pid_c, part = tl.program_id(0), tl.program_id(1)
    first_c = pid_c * BLOCK_C
    offs_c, offs_r = first_c + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    inside = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for m in range(part * slice_tokens, tl.minimum((part + 1) * slice_tokens, M), BLOCK_M):
        left = load_tile(left_ptr, stride_leftm, stride_leftr, m, 0, M, R, BLOCK_M, BLOCK_R, False)
        right = load_tile(right_ptr, stride_rightm, stride_rightc, m, first_c, M, C, BLOCK_M, BLOCK_C, False)
        if seed_ptr is not None:
            offs_m = m + tl.arange(0, BLOCK_M)
            keep = keep_mask(key_1, key_2, offs_m[:, None], offs_c[None, :], (C + 1) // 2, threshold)
            right = tl.where(keep, right, 0.0).to(dtype)
        acc = dot(tl.trans(left), right, acc)
    out_tile = out_ptr + offs_r[:, None].to(tl.int64) * stride_outr + offs_c[None, :].to(tl.int64) * stride_outc
    places = offs_r[:, None].to(tl.int64) * C + offs_c[None, :]
    if SLICED:
        counter_ptr += pid_c
    store_sum(
        out_tile, acc, scale, inside, part_ptr, places, stride_part, part, tl.num_programs(1), counter_ptr,
        SLICED, BLOCK_R, BLOCK_C,
    )  # fmt: skip


def token_reduce_launch(
    left: Tensor, right: Tensor, scale: float, p: float, seed: Tensor | None, out: Tensor, arch: int | None,
    tile: Tile | None = None,
) -> Launch:  # fmt: skip
    (M, R), C = left.shape, right.shape[1]
    block_r = next_block(R)
    tile = tile or side_tile("token_reduce", arch, left.dtype, M, C, R, p, device_name(left.device))
    slice_tokens = max(1, triton.cdiv(triton.cdiv(M, tile.block_m), tile.splits)) * tile.block_m
    slices, tiles = max(1, triton.cdiv(M, slice_tokens)), triton.cdiv(C, tile.block_n)
    sliced = slices > 1
    part = torch.empty(slices, R, C, dtype=torch.float32, device=left.device) if sliced else None
    return Launch(
        _token_reduce_kernel,
        (tiles, slices),
        dict(
            **operand("left", left, "mr"), **operand("right", right, "mc"), **operand("out", out, "rc"),
            part_ptr=part, stride_part=R * C, counter_ptr=counters(tiles, left.device) if sliced else None,
            seed_ptr=seed if p > 0 else None, scale=scale / (1.0 - p), threshold=drop_threshold(p), M=M, C=C, R=R,
            slice_tokens=slice_tokens, SLICED=sliced, BLOCK_M=tile.block_m, BLOCK_C=tile.block_n, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        flops=2 * M * C * R,
    )  # fmt: skip


def token_reduce(
    left: Tensor, right: Tensor, scale: float = 1.0, p: float = 0.0, seed: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`scale * left^T (right * mask / (1 - p))`: `d_a = token_reduce(d_s, x, 1, p, seed)`.

    Args:
        left: `[M, R]`, any strides.
        right: `[M, C]` in the dtype of left, any strides.
        scale: factor of the result, applied in float32.
        p, seed: dropout of `right`, as in `reference.dropout_mask`; `seed` may be None where p is 0.
        out: `[R, C]`, any float dtype and strides, written; None for a new float32 tensor.

    Returns:
        `[R, C]`.
    """
    if out is None:
        out = torch.empty(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
    token_reduce_launch(left, right, scale, p, seed, out, device_arch(left.device)).run(left.device)
    return out
