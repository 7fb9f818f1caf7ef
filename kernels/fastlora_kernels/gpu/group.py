"""`lora_linear_group` and its backward: one read of x gives s of every layer, and d_x is summed where it lies.

s of all layers is one matrix whose columns each layer has a part of. A program reads a tile of x once, drops it once
per layer, and multiplies by that layer's rows of A; the other rows count as zero, so one accumulator serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import FEW_TOKENS, drop_threshold
from .checks import check_operands
from .int8_linear import int8_expand
from .jit import convert, dot, dropout_keys, keep_mask, load_tile
from .launch import Launch, cdiv, device_arch, device_name, next_block, operand
from .lora_linear import lora_linear, planned_expand
from .lora_linear_backward import planned_backward
from .partial import counters, store_sum
from .plan import Plan, choose_plan, side_tile
from .quantize_shrink import quantize_shrink
from .shrink import shrink
from .tiles import MAX_RANK, Tile


@triton.jit
def _group_shrink_kernel(
    x_ptr, stride_xm, stride_xk,  # [M, K]
    a_ptr, stride_ar, stride_ak,  # [layers * R, K]
    s_ptr, stride_sm, stride_sr,  # [M, layers * R]
    part_ptr, stride_part,  # [splits, M, layers * R] float32 where K is split
    counter_ptr,  # [tiles of tokens] int32 where K is split
    seeds_ptr,  # [layers] int64
    scale, threshold, M, K, R, k_per_split,
    LAYERS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    pid_m, split = tl.program_id(0), tl.program_id(1)
    first_m = pid_m * BLOCK_M
    offs_m, offs_r = first_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(split * k_per_split, tl.minimum((split + 1) * k_per_split, K), BLOCK_K):
        x = load_tile(x_ptr, stride_xm, stride_xk, first_m, k, M, K, BLOCK_M, BLOCK_K, False)
        a = load_tile(a_ptr, stride_ar, stride_ak, 0, k, LAYERS * R, K, BLOCK_R, BLOCK_K, False)
        a = convert(a, dtype)
        offs_k = k + tl.arange(0, BLOCK_K)
        for layer in tl.static_range(LAYERS):
            key_1, key_2 = dropout_keys(seeds_ptr + layer)
            keep = keep_mask(key_1, key_2, offs_m[:, None], offs_k[None, :], (K + 1) // 2, threshold)
            own = (offs_r >= layer * R) & (offs_r < (layer + 1) * R)
            dropped = tl.where(keep, x, 0.0).to(dtype)
            acc = dot(dropped, tl.trans(tl.where(own[:, None], a, 0.0).to(dtype)), acc)
    inside = (offs_m < M)[:, None] & (offs_r < LAYERS * R)[None, :]
    s_tile = s_ptr + offs_m[:, None].to(tl.int64) * stride_sm + offs_r[None, :] * stride_sr
    places = offs_m[:, None].to(tl.int64) * (LAYERS * R) + offs_r[None, :]
    if SPLITS > 1:
        counter_ptr += pid_m
    store_sum(
        s_tile, acc, scale, inside, part_ptr, places, stride_part, split, SPLITS, counter_ptr, SPLITS > 1,
        BLOCK_M, BLOCK_R,
    )  # fmt: skip


def group_shrink_launch(
    x: Tensor, a: Tensor, p: float, seeds: Tensor, s: Tensor, arch: int | None, tile: Tile | None = None
) -> Launch:
    """`a` is `[layers * R, K]` and `s` `[M, layers * R]`, for as many layers of one rank as there are seeds."""
    (M, K), layers, rows = x.shape, seeds.numel(), a.shape[0]
    tile = tile or side_tile("group_shrink", arch, x.dtype, M, K, rows, p, device_name(x.device))
    tiles, split = cdiv(M, tile.block_m), tile.splits > 1
    part = torch.empty(tile.splits, M, rows, dtype=torch.float32, device=x.device) if split else None
    return Launch(
        _group_shrink_kernel,
        (tiles, tile.splits),
        dict(
            **operand("x", x, "mk"), **operand("a", a, "rk"), **operand("s", s, "mr"),
            part_ptr=part, stride_part=M * rows, counter_ptr=counters(tiles, x.device) if split else None,
            seeds_ptr=seeds, scale=1.0 / (1.0 - p), threshold=drop_threshold(p), M=M, K=K, R=rows // layers,
            k_per_split=cdiv(cdiv(K, tile.block_c), tile.splits) * tile.block_c,
            LAYERS=layers, SPLITS=tile.splits, BLOCK_M=tile.block_m, BLOCK_K=tile.block_c, BLOCK_R=next_block(rows),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        flops=2 * M * K * rows,
    )  # fmt: skip


def lora_linear_group(
    x: Tensor,
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[Tensor | None],
    threshold: float | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The contract is in `reference.lora_linear_group`. Ranks up to 256."""
    layers = list(zip(ws, w_scales, biases, a_s, b_s, scales, ps, seeds, strict=True))
    if threshold is not None:
        return _int8_group(x, layers, threshold)
    plans = [_plan("forward", x, w, w_scale, a, p) for w, w_scale, _, a, _, _, p, _ in layers]
    one_launch = any(plan.kind in ("decode", "fused") for plan in plans)
    if one_launch or len(set(ps)) > 1 or sum(a.shape[0] for a in a_s) > MAX_RANK:
        results = [lora_linear(x, *layer) for layer in layers]
        return [y for y, _ in results], [s for _, s in results]
    for w, w_scale, bias, a, b, _, _, seed in layers:
        check_operands(x, w, w_scale, a, b, bias=bias, seed=seed)
    ss = _shrink_all(x, a_s, ps[0], seeds)
    given = zip(plans, ws, w_scales, biases, ss, b_s, scales, strict=True)
    return [planned_expand(plan, x, *layer) for plan, *layer in given], ss


def _int8_group(x: Tensor, layers: list[tuple], threshold: float) -> tuple[list[Tensor], list[Tensor]]:
    """The layers with one set of codes of x, where they are int8 and there are tokens enough."""
    ws, w_scales, biases, a_s, b_s, scales, ps, seeds = zip(*layers, strict=True)
    if x.shape[0] <= FEW_TOKENS or None in w_scales or len(set(ps)) > 1 or sum(a.shape[0] for a in a_s) > MAX_RANK:
        compute = partial(lora_linear, threshold=threshold)
        results = [compute(x, *layer) for layer in layers]
        return [y for y, _ in results], [s for _, s in results]
    for w, w_scale, bias, a, b, _, _, seed in layers:
        check_operands(x, w, w_scale, a, b, bias=bias, seed=seed)
    if ps[0] == 0:
        codes, s = quantize_shrink(x, torch.cat(a_s), 0.0, None, threshold)
        ss = _parted(s, [a.shape[0] for a in a_s])
    else:
        codes, _ = quantize_shrink(x, None, 0.0, None, threshold)
        ss = _shrink_all(x, a_s, ps[0], seeds)
    tiles = [_plan("int8", x, w, w_scale, a, p).tile for w, w_scale, _, a, _, _, p, _ in layers]
    given = zip(tiles, ws, w_scales, biases, ss, b_s, scales, strict=True)
    expand = partial(int8_expand, threshold=threshold)
    return [expand(tile, x, codes, *layer) for tile, *layer in given], ss


def _plan(which: str, x: Tensor, w: Tensor, w_scale: Tensor | None, a: Tensor, p: float) -> Plan:
    """The plan of one layer by itself; x stands for d_y in the backward."""
    (N, K), device = w.shape, x.device
    size = x.shape[0], N, K, a.shape[0]
    return choose_plan(device_arch(device), x.dtype, *size, w_scale is not None, p, which, device_name(device))


def _shrink_all(x: Tensor, a_s: Sequence[Tensor], p: float, seeds: Sequence[Tensor | None]) -> list[Tensor]:
    """s of every layer, for one probability to drop."""
    ranks = [a.shape[0] for a in a_s]
    if p == 0:
        s = shrink(x, torch.cat([a.to(a_s[0].dtype) for a in a_s]))
    elif len(set(ranks)) == 1:
        s = torch.empty(x.shape[0], sum(ranks), dtype=x.dtype, device=x.device)
        all_seeds = torch.cat([seed.reshape(1) for seed in seeds if seed is not None])
        group_shrink_launch(x, torch.cat(list(a_s)), p, all_seeds, s, device_arch(x.device)).run(x.device)
    else:
        return [shrink(x, a, p, seed) for a, seed in zip(a_s, seeds, strict=True)]
    return _parted(s, ranks)


def _parted(s: Tensor, ranks: list[int]) -> list[Tensor]:
    """Copies, so that each layer's s can be kept, and freed, by itself."""
    return [part.contiguous() for part in s.split(ranks, dim=1)]


def lora_linear_group_backward(
    d_ys: Sequence[Tensor | None],
    x: Tensor | None,
    ss: Sequence[Tensor | None],
    ws: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    a_s: Sequence[Tensor],
    b_s: Sequence[Tensor],
    scales: Sequence[float],
    ps: Sequence[float],
    seeds: Sequence[Tensor | None],
    needs_x: bool,
    needs_a: Sequence[bool],
    needs_b: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The contract is in `reference.lora_linear_group_backward`. Ranks up to 256; the same inputs, the same bits."""
    d_as, d_bs = [a.new_empty(0) for a in a_s], [b.new_empty(0) for b in b_s]
    d_x = None
    for i, d_y in enumerate(d_ys):
        if d_y is None:
            continue
        layer = ws[i], w_scales[i], a_s[i], b_s[i]
        check_operands(x, *layer, d_y=d_y, s=ss[i], seed=seeds[i])
        plan = _plan("backward", d_y, ws[i], w_scales[i], a_s[i], ps[i])
        needs = needs_x, needs_a[i], needs_b[i]
        part, d_a, d_b = planned_backward(
            plan, d_y, x, ss[i], *layer, scales[i], ps[i], seeds[i], *needs, out=d_x
        )  # fmt: skip
        d_x = part if needs_x else None
        d_as[i], d_bs[i] = d_a if needs_a[i] else d_as[i], d_b if needs_b[i] else d_bs[i]
    return next(d_y for d_y in d_ys if d_y is not None).new_empty(0) if d_x is None else d_x, d_as, d_bs
