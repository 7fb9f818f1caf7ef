"""Every op in plain eager torch. This is the specification: the kernels are tested against it in float64.

All operands are brought to the dtype of `x` (or of `d_y`), as an eager model in that dtype would do.
"""

from .group import lora_linear_group, lora_linear_group_backward
from .int8 import FEW_TOKENS, INT8_MAX, OUTLIER_THRESHOLD, int8_product, quantize_tokens
from .linear import (
    FLOAT16_MAX,
    HASH_MULTIPLIER_1,
    HASH_MULTIPLIER_2,
    HASH_MULTIPLIER_3,
    LANE_BITS,
    LANE_MASK,
    SEED_OFFSET,
    dequantize_rows,
    drop_threshold,
    dropout_mask,
    lora_linear,
    lora_linear_backward,
    merge_rows,
    quantize_rows,
)
from .mixed import lora_linear_mixed, lora_linear_mixed_backward

__all__ = [
    "FEW_TOKENS",
    "FLOAT16_MAX",
    "HASH_MULTIPLIER_1",
    "HASH_MULTIPLIER_2",
    "HASH_MULTIPLIER_3",
    "INT8_MAX",
    "LANE_BITS",
    "LANE_MASK",
    "OUTLIER_THRESHOLD",
    "SEED_OFFSET",
    "dequantize_rows",
    "drop_threshold",
    "dropout_mask",
    "int8_product",
    "lora_linear",
    "lora_linear_backward",
    "lora_linear_group",
    "lora_linear_group_backward",
    "lora_linear_mixed",
    "lora_linear_mixed_backward",
    "merge_rows",
    "quantize_rows",
    "quantize_tokens",
]
