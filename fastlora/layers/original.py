"""Frozen weights that an adapter's initialisation changed, with the originals kept beside them.

PiSSA and its kin move a part of the weight into the adapter: the layer then computes `W_res x + scaling * B A x` with
`W_res = W - scaling * B_0 A_0`. W stays in memory, where it is, since it can be had back exactly in no other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import ops
from .pages import release_pages


@dataclass(frozen=True)
class Original:
    """What `replace_weight` replaced.

    Attributes:
        weight, weight_scale: the layer's parameters from before.
        a, b: the initial adapter `[R, K]`, `[N, R]` that the layer's weight is the original one without.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter | None
    a: Tensor
    b: Tensor


def replace_weight(layer: Any, weight: Tensor, a: Tensor, b: Tensor) -> None:
    """Makes a dense `weight` `[N, K]` the layer's frozen weight, int8 where that is int8, and keeps the one before.

    Where the original lies in a mapped file, its pages are given back and it costs no memory.
    """
    # The adapter that trains may live in the memory of a and b.
    original = Original(layer.weight, layer.weight_scale, a.clone(), b.clone())
    if layer.weight_scale is None:
        layer.weight = nn.Parameter(layer._stored(weight).contiguous(), requires_grad=False)
    else:
        layer.set_int8(*ops.quantize_rows(weight))
    layer.original = original
    release_pages(original.weight.data)


def restore_weight(layer: Any) -> None:
    """Gives a layer whose weight was replaced the original parameters again."""
    original, device = layer.original, layer.weight.device
    if original is None:
        return
    for parameter in (original.weight, original.weight_scale):
        if parameter is not None:
            parameter.data = parameter.data.to(device)
    layer.weight, layer.weight_scale, layer.original = original.weight, original.weight_scale, None
