"""Triton implementations of `fastlora_kernels.reference`, under the same names and signatures."""

from .dropout import dropout_mask
from .group import lora_linear_group, lora_linear_group_backward
from .lora_linear import lora_linear
from .lora_linear_backward import lora_linear_backward
from .merge import merge_rows
from .mixed import lora_linear_mixed, lora_linear_mixed_backward
from .quantize import quantize_rows

__all__ = [
    "dropout_mask",
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_group",
    "lora_linear_group_backward",
    "lora_linear_mixed",
    "lora_linear_mixed_backward",
    "merge_rows",
    "quantize_rows",
]
