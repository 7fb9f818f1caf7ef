"""mask[m, k] = lane(hash(seed, m, k)) >= threshold; the specification is `reference.dropout_mask`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import drop_threshold
from .jit import dropout_keys, keep_mask
from .launch import Launch, cdiv


@triton.jit
def _dropout_mask_kernel(
    seed_ptr,  # [1] int64
    mask_ptr, stride_mm,  # [M, K]
    threshold, M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    key_1, key_2 = dropout_keys(seed_ptr)
    keep = keep_mask(key_1, key_2, offs_m, offs_k, (K + 1) // 2, threshold)
    inside = (offs_m < M) & (offs_k < K)
    tl.store(mask_ptr + offs_m.to(tl.int64) * stride_mm + offs_k, keep, mask=inside)


def dropout_mask_launch(seed: Tensor, mask: Tensor, p: float) -> Launch:
    M, K = mask.shape
    block_m, block_k = 16, 128
    return Launch(
        _dropout_mask_kernel,
        (cdiv(M, block_m), cdiv(K, block_k)),
        dict(
            seed_ptr=seed, mask_ptr=mask, stride_mm=mask.stride(0), threshold=drop_threshold(p), M=M, K=K,
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=4,
        ),
    )  # fmt: skip


def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """Launch `_dropout_mask_kernel`; the contract is in `reference.dropout_mask`."""
    mask = torch.empty(M, K, dtype=torch.bool, device=seed.device)
    dropout_mask_launch(seed, mask, p).run(seed.device)
    return mask
