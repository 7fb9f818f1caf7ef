"""s = (x * mask / (1 - p)) @ A.T in one read of x, with the mask from one of several generators: what does each cost?

The kernels' own generator is the hash; the others are Triton's Philox, with a number or a part of one per element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora_kernels.gpu.jit import convert, dot, dropout_keys, keep_mask
from fastlora_kernels.gpu.launch import Launch
from fastlora_kernels.reference import LANE_BITS, LANE_MASK, drop_threshold

VARIANTS = ("none", "hash", "rand", "randint4x, 10 rounds", "randint4x, 7 rounds", "16-bit lanes, 7 rounds")
ROUNDS = {"randint4x, 10 rounds": 10, "randint4x, 7 rounds": 7, "16-bit lanes, 7 rounds": 7}
_LANE_MASK = tl.constexpr(LANE_MASK)
_LANES = tl.constexpr(float(1 << LANE_BITS))
_NONE, _HASH, _RAND, _RANDINT4X = (tl.constexpr(index) for index in range(4))
_KINDS = {"none": _NONE, "hash": _HASH, "rand": _RAND}


@triton.jit
def _interleaved(a, b, c, d, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr):
    """`[BLOCK_M, COLUMNS]` of four tiles with a quarter of the columns each."""
    return tl.join(tl.join(a, b), tl.join(c, d)).reshape(BLOCK_M, COLUMNS)


@triton.jit
def _lanes(
    seed, offs_m, k, K, ROUNDS: tl.constexpr, HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """15-bit numbers, one per element, of one 32-bit number each or of half of one."""
    numbers: tl.constexpr = 4 * HALVES
    offsets = offs_m[:, None] * tl.cdiv(K, numbers) + k // numbers + tl.arange(0, BLOCK_K // numbers)[None, :]
    a, b, c, d = tl.randint4x(seed, offsets, ROUNDS)
    words = _interleaved(a, b, c, d, BLOCK_M, BLOCK_K // HALVES).to(tl.int32)
    if HALVES == 1:
        lanes = words & _LANE_MASK
    else:
        lanes = tl.join(words & _LANE_MASK, (words >> 16) & _LANE_MASK).reshape(BLOCK_M, BLOCK_K)
    return lanes


@triton.jit
def _masked_shrink_kernel(
    x_ptr, a_ptr, s_ptr,  # [M, K], [R, K] and [M, R], contiguous
    seed_ptr,  # [1] int64
    threshold, scale, M, K, R,
    KIND: tl.constexpr, ROUNDS: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    key_1, key_2 = dropout_keys(seed_ptr)
    seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        places = offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
        x = tl.load(x_ptr + places, inside, other=0.0)
        a = tl.load(
            a_ptr + offs_r[:, None] * K + offs_k[None, :], (offs_r < R)[:, None] & (offs_k < K)[None, :], other=0.0
        )
        if KIND == _HASH:
            x = tl.where(keep_mask(key_1, key_2, offs_m[:, None], offs_k[None, :], (K + 1) // 2, threshold), x, 0.0)
        elif KIND == _RAND:
            lanes = (tl.rand(seed, places.to(tl.int32)) * _LANES).to(tl.int32)
            x = tl.where(lanes >= threshold, x, 0.0)
        elif KIND == _RANDINT4X:
            x = tl.where(_lanes(seed, offs_m, k, K, ROUNDS, HALVES, BLOCK_M, BLOCK_K) >= threshold, x, 0.0)
        acc = dot(x.to(dtype), tl.trans(convert(a, dtype)), acc)
    s_tile = s_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
    tl.store(s_tile, convert(acc * scale, dtype), (offs_m < M)[:, None] & (offs_r < R)[None, :])


def masked_shrink_launch(
    x: Tensor, a: Tensor, p: float, seed: Tensor, variant: str, s: Tensor, block_m: int = 64
) -> Launch:
    (M, K), R = x.shape, a.shape[0]
    return Launch(
        _masked_shrink_kernel,
        (triton.cdiv(M, block_m),),
        dict(
            x_ptr=x, a_ptr=a, s_ptr=s, seed_ptr=seed, threshold=drop_threshold(p),
            scale=1.0 if variant == "none" else 1.0 / (1.0 - p), M=M, K=K, R=R,
            KIND=_KINDS.get(variant, _RANDINT4X).value, ROUNDS=ROUNDS.get(variant, 10),
            HALVES=2 if variant.startswith("16-bit") else 1,
            BLOCK_M=block_m, BLOCK_K=64, BLOCK_R=max(16, triton.next_power_of_2(R)), num_warps=4, num_stages=3,
        ),
    )  # fmt: skip


def masked_shrink(x: Tensor, a: Tensor, p: float, seed: Tensor, variant: str, block_m: int = 64) -> Tensor:
    """`[M, R]` in the dtype of x; `none` drops nothing."""
    s = torch.empty(x.shape[0], a.shape[0], dtype=x.dtype, device=x.device)
    masked_shrink_launch(x, a, p, seed, variant, s, block_m).run(x.device)
    return s


def meta_launch(variant: str, M: int = 8192, K: int = 4096, R: int = 16) -> Launch:
    """What the first figures launch, on tensors without memory."""
    x, s = (torch.empty(M, columns, dtype=torch.bfloat16, device="meta") for columns in (K, R))
    a, seed = torch.empty(R, K, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    return masked_shrink_launch(x, a, 0.05, seed, variant, s)
