"""Modules that hold a frozen weight and adapters, and call the ops."""

from __future__ import annotations

from typing import Any

import torch

from .attention import LoraAttention
from .base import LoraLayer, become, rebind_hooked_forward
from .bitsandbytes import is_linear4bit, is_linear8bit, outlier_threshold, read_int8
from .conv import LoraConvolution1d, LoraConvolution2d, LoraConvolution3d
from .embedding import LoraEmbedding
from .experts import LoraParameter, ParameterTarget
from .families import dissolve_groups, form_groups
from .gated import dissolve_gated, form_gated
from .head import Float32Head
from .linear import EQUIVALENT_LINEARS, LinearLayer, LoraConv1D, LoraLinear
from .linear4bit import LoraLinear4bit
from .original import replace_weight
from .tokens import TokenLayer, adopt_tokens, token_kind

__all__ = [
    "ADAPTABLE",
    "EQUIVALENT_LINEARS",
    "KINDS",
    "Float32Head",
    "LinearLayer",
    "LoraAttention",
    "LoraConv1D",
    "LoraConvolution1d",
    "LoraConvolution2d",
    "LoraConvolution3d",
    "LoraEmbedding",
    "LoraLayer",
    "LoraLinear",
    "LoraLinear4bit",
    "LoraParameter",
    "ParameterTarget",
    "TokenLayer",
    "adopt",
    "adopt_tokens",
    "dissolve_gated",
    "dissolve_groups",
    "form_gated",
    "form_groups",
    "is_linear4bit",
    "is_linear8bit",
    "kind_of",
    "outlier_threshold",
    "read_int8",
    "rebind_hooked_forward",
    "replace_weight",
    "token_kind",
]

KINDS: tuple[type[LoraLayer], ...] = (
    LoraLinear, LoraConv1D, LoraEmbedding, LoraConvolution1d, LoraConvolution2d, LoraConvolution3d,
    LoraLinear4bit, LoraAttention, LoraParameter,
)  # fmt: skip
ADAPTABLE = "nn.Linear, Conv1D, nn.Embedding, nn.MultiheadAttention or nn.Conv1d, 2d or 3d"  # in words


def kind_of(module: Any) -> type[LoraLayer] | None:
    """The kind of LoRA layer that a module or parameter is or can become; None where it can become none."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return None
    # The class of a layer may be a kind's or, for a kind that builds on the original, one made for the two.
    return next((kind for kind in KINDS if isinstance(module, kind) or kind.accepts(module)), None)


def adopt(module: Any) -> LoraLayer:
    """Turns a module that `kind_of` knows into a LoRA layer without adapters, in place; one that is stays as it is."""
    kind = kind_of(module)
    if isinstance(module, LoraLayer) or kind is None:
        return module
    if isinstance(module, ParameterTarget):
        return LoraParameter.adopt(module)
    return become(module, kind, _dense_dtype(module, kind))


def _dense_dtype(module: Any, kind: type[LoraLayer]) -> torch.dtype:
    """The dtype that a module's weight is meant to be of."""
    if is_linear4bit(module):
        return module.quant_state.dtype
    return torch.float16 if is_linear8bit(module) else kind.dtype_of(module)
