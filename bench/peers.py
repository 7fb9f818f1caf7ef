"""The libraries that fastlora is compared with, where they are installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from gpu import NotInstalledError
from torch import nn


def imported(name: str) -> Any:
    """A peer's library, imported where a benchmark needs it and never before."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(str(error)) from None


def bitsandbytes_linear(linear: nn.Linear, device: torch.device | str) -> nn.Module:
    """What transformers makes of a linear layer with `load_in_8bit`."""
    library = imported("bitsandbytes")
    layer = library.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = library.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    return layer.to(device)
