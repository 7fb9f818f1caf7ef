"""PEFT's LoRA layer over bitsandbytes' 8-bit linear layer, on fastlora's int8 op."""

from __future__ import annotations

from typing import Any

import bitsandbytes
from peft.tuners.lora import bnb
from torch import Tensor

from fastlora_kernels.reference import INT8_MAX

from .peft_layers import OnOps


class FastLoraLinear8bitLt(OnOps, bnb.Linear8bitLt):
    """PEFT's LoRA layer over `Linear8bitLt`, whose codes and scales the op reads where bitsandbytes keeps them."""

    peft_class = bnb.Linear8bitLt
    # Without an adapter too, or the base would change by bitsandbytes' rounding of the input when they are disabled.
    computes_base = True

    @staticmethod
    def base_obstacle(base: Any) -> str | None:
        if type(base).forward is not bitsandbytes.nn.Linear8bitLt.forward:
            return f"a base layer of class {type(base).__name__}"
        if base.state.has_fp16_weights:
            return "an 8-bit base layer that keeps its weight in float16"
        codes, absmax = _codes_and_absmax(base)
        return "an 8-bit base layer that is not quantised yet" if codes is None or absmax is None else None

    @staticmethod
    def frozen_weight(base: Any) -> Tensor:
        return _codes_and_absmax(base)[0]

    @staticmethod
    def weight_scale(base: Any) -> Tensor:
        return _codes_and_absmax(base)[1].float() / INT8_MAX


def _codes_and_absmax(base: Any) -> tuple[Any, Any]:
    """CB `[N, K]` and SCB `[N]`: those on the weight, which bitsandbytes' next forward moves to its state, go first."""
    holder = base.state if base.weight.CB is None else base.weight
    return holder.CB, holder.SCB
