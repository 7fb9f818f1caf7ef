"""LoRA models of PEFT, run on fastlora's ops in place.

Every LoRA layer whose work the ops can do gets a subclass of its own class, with another forward. The model stays a
PeftModel in every other respect: its adapters are added, chosen, merged, swapped, saved and loaded by PEFT.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from .. import ops
from ..layers import rebind_hooked_forward
from ..log import logger
from .peft_layers import FastLoraLinear, OnOps, obstacle


def patch(model: nn.Module) -> nn.Module:
    """Runs the LoRA layers of a PeftModel on fastlora's ops: `W x + bias + scaling * B A dropout(x)` in one call.

    Linear layers over `nn.Linear`, transformers' `Conv1D` and bitsandbytes' `Linear8bitLt` are patched; `plan` says
    which, and why not the others. Those over 4-bit weights are not: bitsandbytes multiplies with them in kernels of
    its own, and the op that adds an adapter has no other frozen weight than a dense or an int8 one. A patched layer
    calls PEFT's own forward whenever a call is not plain LoRA: adapters disabled, merged, chosen per row or several
    at once, DoRA and its kin, hooks inside the layer.

    What changes beside the speed:

    - A 16-bit layer computes its low-rank part in 16 bits with float32 accumulation, where PEFT casts its input up.
    - The dropout masks are fastlora's, drawn from a seed of torch's generator.
    - An 8-bit layer multiplies with its dequantised weight, where bitsandbytes also rounds the input to 8 bits
      (LLM.int8, Dettmers et al. 2022), so it is the more accurate one. So does a layer whose adapters are disabled:
      a frozen reference model and the model that trains have the same base.
    - Gradients are not differentiable a second time.

    Layers that PEFT adds later are patched by another call; those patched already stay as they are.

    Args:
        model: a `peft.PeftModel`, or any model with LoRA layers of PEFT in it.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no LoRA layers of PEFT.
    """
    _log(plan(model))
    for layer in _lora_layers(model).values():
        fast = _fast_class(layer)
        if fast is not None and not isinstance(layer, OnOps):
            layer.__class__ = fast
            rebind_hooked_forward(layer)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Gives every layer that `patch` changed its class of PEFT back; the adapters stay.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not patched.
    """
    patched: list[Any] = [layer for layer in model.modules() if isinstance(layer, OnOps)]
    if not patched:
        raise ValueError(f"model: expected one that was patched, found {type(model).__name__} with PEFT's own layers")
    for layer in patched:
        layer.__class__ = layer.peft_class
        rebind_hooked_forward(layer)
    return model


def plan(model: nn.Module) -> list[tuple[str, str, str]]:
    """What computes each LoRA layer of a model once it is patched, in its present state; changes nothing.

    Returns:
        (module name, "fast" or "fallback", reason) per LoRA layer, in the order of the model's modules. For a fast
        layer the reason is the implementation, for the others what keeps them with PEFT. What depends on a layer's
        input (its dtype, its device) is not known here.

    Raises:
        ValueError: the model has no LoRA layers of PEFT.
    """
    return [(name, *_verdict(layer)) for name, layer in _lora_layers(model).items()]


def _verdict(layer: Any) -> tuple[str, str]:
    fast = _fast_class(layer)
    if fast is None:
        return "fallback", f"there is no fast layer for {type(layer).__module__}.{type(layer).__qualname__}"
    if (reason := obstacle(fast, layer)) is not None:
        return "fallback", reason
    weight = fast.frozen_weight(layer.base_layer)
    return "fast", f"weight in {str(weight.dtype).removeprefix('torch.')}; {ops.describe(weight.device, weight.dtype)}"


def _fast_class(layer: Any) -> type[OnOps] | None:
    """The patched class of a LoRA layer, or None where there is none."""
    if isinstance(layer, OnOps):
        return type(layer)
    if type(layer) is lora.Linear:
        return FastLoraLinear
    # PEFT imports its layers for bitsandbytes where that is installed, with the first LoRA model.
    bitsandbytes = sys.modules.get("peft.tuners.lora.bnb")
    if bitsandbytes is not None and type(layer) is getattr(bitsandbytes, "Linear8bitLt", None):
        from .peft_bitsandbytes import FastLoraLinear8bitLt

        return FastLoraLinear8bitLt
    return None


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's LoRA layers of a model by module name, or ValueError where there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError(f"model: expected LoRA layers of PEFT, found none in {type(model).__name__}")
    return layers


def _log(verdicts: list[tuple[str, str, str]]) -> None:
    for (verdict, reason), count in Counter(verdict[1:] for verdict in verdicts).items():
        if verdict == "fast":
            logger.info("%d LoRA layers of PEFT on fastlora's ops: %s", count, reason)
        else:
            logger.warning("%d LoRA layers run as PEFT runs them: %s", count, reason)
