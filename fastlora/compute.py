"""In which dtype the layers with int8 weights multiply."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .adapters.registry import patched_layers
from .layers import LinearLayer, LoraLayer, is_linear8bit, kind_of, outlier_threshold

COMPUTES = (None, "int8")


def set_compute(model: nn.Module, compute: str | None) -> None:
    """Chooses in which dtype a patched model's layers with int8 weights multiply; it can be changed at any time.

    - None: in the dtype of the activations (W8A16), which is as accurate as the int8 weights allow. The default.
    - "int8": activations are quantised per token, too (W8A8, LLM.int8(), Dettmers et al. 2022), for the integer tensor
      cores of a GPU. Elements from 6.0 on in magnitude (`llm_int8_threshold`, where the layer came from bitsandbytes)
      are multiplied in the dtype of the activations. Up to 16 tokens, where the weight's bytes are the time, and in
      batches with an adapter per row, nothing changes; nor do the low-rank part and the gradients. On a CPU it gives
      the same numbers and is no faster.

    Raises:
        ValueError: the model is not patched, the choice is another, or "int8" where no layer has an int8 weight.
    """
    layers = patched_layers(model)
    _check_known(compute)
    with_codes = [layer for layer in layers.values() if isinstance(layer, LinearLayer) and layer.multiplies_codes()]
    if compute is not None and not with_codes:
        raise ValueError("compute: expected layers with int8 weights (quantize='int8') for 'int8', found none")
    put_compute(with_codes, compute)


def check_compute(targets: Mapping[str, Any], quantize: str | None, compute: str | None) -> None:
    """Raises ValueError for an unknown choice, or where no target is to have an int8 weight."""
    _check_known(compute)
    if compute is not None and not any(_gets_codes(module, quantize) for module in targets.values()):
        raise ValueError(
            "compute: expected quantize='int8', or 8-bit layers of bitsandbytes among the targets, for 'int8', found "
            f"quantize={quantize!r}"
        )  # fmt: skip


def put_compute(layers: Iterable[LoraLayer], compute: str | None) -> None:
    """What `set_compute` does, for layers that were checked; it changes those with int8 weights alone."""
    for layer in layers:
        if isinstance(layer, LinearLayer) and layer.multiplies_codes():
            layer.threshold = None if compute is None else outlier_threshold(layer) or math.inf


def _check_known(compute: str | None) -> None:
    if compute not in COMPUTES:
        raise ValueError(f"compute: expected one of {COMPUTES}, found {compute!r}")


def _gets_codes(module: Any, quantize: str | None) -> bool:
    if isinstance(module, LinearLayer):
        return module.multiplies_codes() or quantize is not None
    kind = kind_of(module)
    return is_linear8bit(module) or (quantize is not None and kind is not None and issubclass(kind, LinearLayer))
