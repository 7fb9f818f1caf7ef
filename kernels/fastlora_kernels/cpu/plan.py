"""In which dtype this CPU multiplies matrices, and what it does with int8 weights."""

from __future__ import annotations

import functools

import torch

FEW_TOKENS = 16  # up to here reading int8 beats casting it, measured on AVX2 and AVX512 at 1024 to 2752 features


@functools.cache
def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are computed: its own where this CPU has kernels for it, else float32.

    Without them PyTorch falls back to scalar loops: a product in bfloat16 was measured at 8 to 180 times one in
    float32 on AVX2.
    """
    return dtype if _has_kernels(dtype) else torch.float32


def _has_kernels(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def describe(dtype: torch.dtype) -> str:
    """How `lora_linear` computes for inputs of `dtype` on this CPU, in words."""
    width, own = str(product_dtype(dtype)).removeprefix("torch."), str(dtype).removeprefix("torch.")
    reason = "" if width == own else f", as this CPU has no kernels for {own}"
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, products in {width}{reason}"
