"""The operators on weights and masks, none of them differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import implementation


@torch.library.custom_op("fastlora::quantize_rows", mutates_args=())
def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax int8 per row; the contract is in `fastlora_kernels.reference.quantize_rows`."""
    return implementation(w).quantize_rows(w)


@quantize_rows.register_fake
def _quantize_rows_fake(w):
    return w.new_empty(w.shape, dtype=torch.int8), w.new_empty(w.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastlora::merge_rows", mutates_args=())
def merge_rows(w: Tensor, w_scale: Tensor | None, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`W + scale * B A`, int8 again where W is; the contract is in `fastlora_kernels.reference.merge_rows`."""
    return implementation(w).merge_rows(w, w_scale, a, b, scale)


@merge_rows.register_fake
def _merge_rows_fake(w, w_scale, a, b, scale):
    return torch.empty_like(w), w.new_empty(0 if w_scale is None else w.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastlora::dropout_mask", mutates_args=())
def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """The dropout mask of a seed; the contract is in `fastlora_kernels.reference.dropout_mask`."""
    return implementation(seed).dropout_mask(seed, M, K, p)


@dropout_mask.register_fake
def _dropout_mask_fake(seed, M, K, p):
    return seed.new_empty(M, K, dtype=torch.bool)
