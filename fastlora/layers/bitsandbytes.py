"""Reading and rebuilding bitsandbytes' 8-bit linear modules, without importing bitsandbytes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastlora_kernels.reference import INT8_MAX, OUTLIER_THRESHOLD


def is_linear4bit(module: Any) -> bool:
    """Whether `module` is a bitsandbytes `Linear4bit` whose weight is quantised."""
    library = sys.modules.get("bitsandbytes.nn")
    return library is not None and isinstance(module, library.Linear4bit) and module.quant_state is not None


def is_linear8bit(module: Any) -> bool:
    """Whether `module` is a bitsandbytes `Linear8bitLt` that keeps its weight in int8."""
    # A model that has one has imported bitsandbytes; fastlora need not, and its import is not free.
    library = sys.modules.get("bitsandbytes.nn")
    return library is not None and isinstance(module, library.Linear8bitLt) and not module.state.has_fp16_weights


def read_int8(module: Any) -> tuple[Tensor, Tensor] | None:
    """Codes `[N, K]` and scale `[N]` of a `Linear8bitLt`; None before it quantises.

    They start on the weight and move to the module's state on its next forward, whatever is there.
    """
    weight, state = module.weight, module.state
    codes = weight.CB if weight.CB is not None else state.CB
    absmax = weight.SCB if weight.SCB is not None else state.SCB
    if absmax is None:
        return None
    return (weight.data if codes is None else codes), absmax.float() / INT8_MAX


def outlier_threshold(module: Any) -> float:
    """The magnitude from which a layer's inputs are outliers: bitsandbytes' where it is its own; 0 for none."""
    return float(getattr(getattr(module, "state", None), "threshold", OUTLIER_THRESHOLD))


def take_int8(module: Any) -> tuple[Tensor, Tensor] | None:
    """What `read_int8` finds; the module's own references to it are dropped."""
    int8 = read_int8(module)
    if int8 is not None:
        module.state.CB, module.state.SCB = None, None
    return int8


def restore_linear8bit(module: Any, q: Tensor, scale: Any) -> None:
    """Gives a module whose class is `Linear8bitLt` again its int8 weight."""
    # absmax is a float16 value, which the rounding brings back exactly.
    absmax = (scale.float() * INT8_MAX).to(torch.float16).float()
    parameters = sys.modules["bitsandbytes.nn"].Int8Params
    module.weight = parameters(q, requires_grad=False, has_fp16_weights=False, CB=q, SCB=absmax)
