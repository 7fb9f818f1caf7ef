"""Torch operators over `fastlora_kernels`: schema, shape inference, autograd and the choice of implementation."""

from .dispatch import describe, implementation, is_slow, using
from .dtensor import is_dtensor
from .float32 import linear_float32
from .linear import lora_linear
from .weights import dropout_mask, merge_rows, quantize_rows

__all__ = [
    "describe",
    "dropout_mask",
    "implementation",
    "is_dtensor",
    "is_slow",
    "linear_float32",
    "lora_linear",
    "merge_rows",
    "quantize_rows",
    "using",
]
