"""Modules that hold a frozen weight and adapters, and call the ops."""

from .bitsandbytes import is_linear8bit, read_int8
from .linear import LoraConv1D, LoraLayer, LoraLinear, adopt, is_adaptable
from .original import replace_weight

__all__ = [
    "LoraConv1D", "LoraLayer", "LoraLinear", "adopt", "is_adaptable", "is_linear8bit", "read_int8", "replace_weight"
]  # fmt: skip
