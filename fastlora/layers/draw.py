"""The initial values of an adapter."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


def draw_pair(a: Any, b: Any, rank: int, init: bool | str) -> dict[str, Tensor]:
    """The tensors of a new adapter whose A and B are two modules, made in PEFT's order.

    Args:
        init: True (A Kaiming uniform, B zero), "gaussian" (A normal with deviation 1/rank, B zero) or False (both as
            the modules were made).
    """
    if init == "gaussian":
        nn.init.normal_(a.weight, std=1 / rank)
    elif init:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    if init is not False:
        for tensor in b.parameters():
            nn.init.zeros_(tensor)
    parts = {"lora_A.weight": a.weight.data, "lora_B.weight": b.weight.data}
    return parts if getattr(b, "bias", None) is None else parts | {"lora_B.bias": b.bias.data}
