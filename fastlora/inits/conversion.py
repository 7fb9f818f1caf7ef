"""Adapters whose initialisation changed the frozen weight, in files for the original weight.

With `W_res = W - s B_0 A_0`, the trained layer's `W_res + s B A` is `W + s [B, -B_0] [A; A_0]`: an ordinary adapter of
twice the rank (PiSSA, Meng et al. 2024, appendix C), which every tool reads and no decomposition has to be repeated
for. A file of PEFT's that names the method holds A and B alone, and PEFT decomposes the base again to load it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..layers import LoraLayer
from ..log import logger
from ..models.distributed import gathered
from .choose import changes_weight, initial_adapters
from .target import Initial


def itself(parameter: nn.Parameter) -> Tensor:
    return parameter


def as_saved(
    layer: LoraLayer, adapter: str, config: LoraConfig, value: Callable[[nn.Parameter], Tensor] = itself
) -> dict[str, Tensor]:
    """The tensors of a layer's adapter for the original weight, with A `[R, K]` and B `[N, R]`, or of rank 2 R.

    LoftQ's stay as they are, since `W - Q` has full rank: a file names the method, and loading it quantises W again.
    """
    parts = gathered({part: value(parameter) for part, parameter in layer.parts(adapter).items()})
    before = getattr(layer, "original", None)
    if before is None or config.init_lora_weights == "loftq":
        return parts
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    doubled = {
        "lora_A.weight": torch.cat([a, before.a.to(a)]),
        "lora_B.weight": torch.cat([b, -before.b.to(b)], dim=1),
    }
    return parts | doubled


def saved_config(config: LoraConfig, layers: list[LoraLayer]) -> LoraConfig:
    """The config of what `as_saved` gives for the layers of an adapter: the same scalings at twice the rank."""
    if all(getattr(layer, "original", None) is None for layer in layers) or config.init_lora_weights == "loftq":
        return config
    if any(getattr(layer, "weight_scale", None) is not None for layer in layers):
        logger.warning(
            "the adapter is saved for the original weights; it was trained beside int8 codes of what %r left of them, "
            "whose rounding is not in the file", config.init_lora_weights,
        )  # fmt: skip
    factor = math.sqrt(2) if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
    )


def initial_for_file(model: nn.Module, modules: dict[str, Any], config: LoraConfig, folder: Any) -> dict[str, Initial]:
    """What the modules' frozen weights must become for an adapter from a file whose config names the method.

    PEFT decomposes the weights again for PiSSA and OLoRA, quantises them again for LoftQ, and leaves them alone for
    LoRA-GA, whose file is then right on the weights that LoRA-GA left and on no others. It loads no CorDA file.

    Raises:
        ValueError: the weights cannot be had back from the file, or cannot be decomposed.
    """
    method = config.init_lora_weights
    if method == "corda":
        raise ValueError(
            f"{folder}: expected an adapter for the original weights, found one for what 'corda' left of them, which "
            "needs its data; save it in PEFT with path_initial_model_for_weight_conversion"
        )
    if method == "lora_ga":
        logger.warning("%s: the adapter is right only on the weights that its initialisation, LoRA-GA, left", folder)
    if method == "lora_ga" or not changes_weight(method):
        return {}
    if "_niter_" in str(method):
        logger.warning(
            "%s: %r decomposes the weights at random, so they are only near those that the adapter was trained on",
            folder, method,
        )  # fmt: skip
    # A file has them in another order than the model, in which PEFT draws.
    return initial_adapters(model, {name: m for name, m in model.named_modules() if name in modules}, config)
