"""Native CPU implementations of `fastlora_kernels.reference`: vectorised torch around oneDNN's GEMMs.

Names, signatures and contracts are those of the reference.
"""

from .dropout import dropout_mask
from .group import lora_linear_group, lora_linear_group_backward
from .linear import lora_linear, lora_linear_backward
from .mixed import lora_linear_mixed, lora_linear_mixed_backward
from .plan import describe as describe
from .plan import product_dtype as product_dtype
from .weights import merge_rows, quantize_rows

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
