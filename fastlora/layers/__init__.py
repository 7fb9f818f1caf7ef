"""Modules that hold a frozen weight and adapters, and call the ops."""

from .bitsandbytes import is_linear8bit
from .head import Float32Head
from .linear import LoraConv1D, LoraLayer, LoraLinear, adopt, is_adaptable

__all__ = ["Float32Head", "LoraConv1D", "LoraLayer", "LoraLinear", "adopt", "is_adaptable", "is_linear8bit"]
