"""Random operands for the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastlora_kernels import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# M tokens, K in_features, N out_features, R rank.
SHAPES = {
    "one-of-each": (1, 1, 1, 1),
    "one-token": (1, 64, 96, 8),
    "few-tokens": (3, 96, 40, 8),
    "ragged": (37, 100, 63, 5),
    "several-tiles": (130, 192, 160, 16),
    "wide-rank": (33, 65, 70, 80),
}


def make_weight(N: int, K: int, dtype: torch.dtype, int8: bool, device: str) -> tuple[Tensor, Tensor | None]:
    """A dense weight and None, or int8 codes and their scale."""
    w = torch.randn(N, K, device=device) / K**0.5
    return reference.quantize_rows(w) if int8 else (w.to(dtype), None)


def linear_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, *, int8: bool = False, p: float = 0.0,
    bias: bool = True, adapter: bool = True, adapter_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `lora_linear`, scaled so that the frozen and the low-rank part weigh alike."""
    M, K, N, R = shape
    w, w_scale = make_weight(N, K, dtype, int8, device)
    return dict(
        x=torch.randn(M, K, device=device).to(dtype), w=w, w_scale=w_scale,
        bias=torch.randn(N, device=device).to(dtype) if bias else None,
        a=(torch.randn(R, K, device=device) / K**0.5).to(adapter_dtype) if adapter else None,
        b=torch.randn(N, R, device=device).to(adapter_dtype) if adapter else None,
        scale=1.7 / R**0.5, p=p, seed=torch.tensor([987654321987654321], device=device) if p > 0 else None,
    )  # fmt: skip


def backward_inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, **options: Any
) -> dict[str, Any]:
    """Arguments of `lora_linear_backward`."""
    inputs = linear_inputs(shape, dtype, device, bias=False, **options)
    _, s = reference.lora_linear(**inputs)
    has_adapter = inputs["a"] is not None
    del inputs["bias"]
    d_y = torch.randn(shape[0], shape[2], device=device).to(dtype)
    return dict(d_y=d_y, s=s, needs_x=True, needs_a=has_adapter, needs_b=has_adapter, **inputs)
