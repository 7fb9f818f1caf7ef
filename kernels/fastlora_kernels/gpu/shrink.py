"""First half of LoRA: s = scale * (x * mask / (1 - p)) @ A.T, in one read of x.

Where few tokens would leave most of a GPU idle, programs share the features of a tile of tokens and add their parts
in a fixed order. The dropped x is the left operand of the product, which takes it from registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .jit import convert, dot, dropout_keys, keep_mask, load_tile
from .launch import Launch, device_arch, device_name, next_block, operand
from .partial import arrives_last, counters, sum_of_parts
from .plan import side_tile
from .tiles import Tile


@triton.jit
def _shrink_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    a_ptr, stride_ar, stride_ak,  # [R, K]
    s_ptr, stride_sm, stride_sr,  # [M, R]
    part_ptr, stride_part,  # [splits, M, R] float32 where K is split
    counter_ptr,  # [tiles of tokens] int32 where K is split
    seed_ptr,  # [1] int64 or None
    scale, threshold, M, K, R, k_per_split,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    pid_m, split = tl.program_id(0), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    inside = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    if seed_ptr is not None:
        key_1, key_2 = dropout_keys(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(split * k_per_split, tl.minimum((split + 1) * k_per_split, K), BLOCK_K):
        x = load_tile(x_ptr, stride_xm, stride_xk, pid_m * BLOCK_M, k, M, K, BLOCK_M, BLOCK_K, False)
        if seed_ptr is not None:
            offs_k = k + tl.arange(0, BLOCK_K)
            keep = keep_mask(key_1, key_2, offs_m[:, None], offs_k[None, :], (K + 1) // 2, threshold)
            x = tl.where(keep, x, 0.0).to(dtype)
        a = load_tile(a_ptr, stride_ar, stride_ak, 0, k, R, K, BLOCK_R, BLOCK_K, False)
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
    tile: Tile | None = None,
) -> Launch:  # fmt: skip
    (M, K), R = x.shape, a.shape[0]
    block_r = next_block(R)
    tile = tile or side_tile("shrink", arch, x.dtype, M, K, R, p, device_name(x.device))
    tiles = triton.cdiv(M, tile.block_m)
    k_per_split = triton.cdiv(triton.cdiv(K, tile.block_c), tile.splits) * tile.block_c
    split = tile.splits > 1
    part = torch.empty(tile.splits, M, R, dtype=torch.float32, device=x.device) if split else None
    return Launch(
        _shrink_kernel,
        (tiles, tile.splits),
        dict(
            **operand("x", x, "mk"), **operand("a", a, "rk"), **operand("s", s, "mr"),
            part_ptr=part, stride_part=M * R, counter_ptr=counters(tiles, x.device) if split else None,
            seed_ptr=seed if p > 0 else None, scale=scale / (1.0 - p), threshold=drop_threshold(p),
            M=M, K=K, R=R, k_per_split=k_per_split,
            SPLITS=tile.splits, BLOCK_M=tile.block_m, BLOCK_K=tile.block_c, BLOCK_R=block_r,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        flops=2 * M * K * R,
    )  # fmt: skip


def shrink(x: Tensor, a: Tensor, p: float = 0.0, seed: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`scale * (x * mask / (1 - p)) A^T` in one read of x.

    Args:
        x: `[M, K]`, any strides.
        a: `[R, K]`, any strides and float dtype; the backward's `d_s` is `shrink(d_y, b.T, scale=scale)`.
        p, seed: dropout of x, as in `reference.dropout_mask`; `seed` may be None where p is 0.
        scale: factor of the result, applied in float32.

    Returns:
        `[M, R]` in the dtype of x.
    """
    s = torch.empty(x.shape[0], a.shape[0], dtype=x.dtype, device=x.device)
    shrink_launch(x, a, p, seed, scale, s, device_arch(x.device)).run(x.device)
    return s
