"""Modules that hold a frozen weight and adapters, and call the ops."""

from .bitsandbytes import is_linear8bit
from .linear import (
    EQUIVALENT_LINEARS,
    LoraConv1D,
    LoraLayer,
    LoraLinear,
    adopt,
    is_adaptable,
    rebind_hooked_forward,
)

__all__ = [
    "EQUIVALENT_LINEARS",
    "LoraConv1D",
    "LoraLayer",
    "LoraLinear",
    "adopt",
    "is_adaptable",
    "is_linear8bit",
    "rebind_hooked_forward",
]
