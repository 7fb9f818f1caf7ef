"""Torch operators over `fastlora_kernels`: schema, shape inference, autograd and the choice of implementation."""

from .dispatch import Place, describe, gpu_plans, implementation, is_slow, using
from .dtensor import is_dtensor
from .float32 import linear_float32
from .gated import lora_linear_gated
from .group import lora_linear_group
from .linear import is_plain, lora_linear
from .mixed import lora_linear_mixed
from .weights import dropout_mask, merge_rows, quantize_rows

__all__ = [
    "Place",
    "describe",
    "dropout_mask",
    "gpu_plans",
    "implementation",
    "is_dtensor",
    "is_plain",
    "is_slow",
    "linear_float32",
    "lora_linear",
    "lora_linear_gated",
    "lora_linear_group",
    "lora_linear_mixed",
    "merge_rows",
    "quantize_rows",
    "using",
]
