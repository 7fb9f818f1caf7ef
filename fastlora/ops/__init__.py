"""Torch operators over `fastlora_kernels`: schema, shape inference, autograd and the choice of implementation."""

from .dispatch import describe, implementation, is_slow, using
from .float32 import linear_float32
from .group import lora_linear_group
from .linear import lora_linear
from .mixed import lora_linear_mixed
from .weights import dropout_mask, merge_rows, quantize_rows

__all__ = [
    "describe",
    "dropout_mask",
    "implementation",
    "is_slow",
    "linear_float32",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_mixed",
    "merge_rows",
    "quantize_rows",
    "using",
]
