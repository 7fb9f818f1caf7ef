"""Tensors of which a process has a part."""

from __future__ import annotations

import sys
from typing import Any


def is_dtensor(tensor: Any) -> bool:
    # Where nothing has imported them there are none, and the import is not free.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_local(*tensors: Any) -> None:
    """Raises TypeError where a tensor is one of which a process has a part."""
    for tensor in tensors:
        if is_dtensor(tensor):
            raise TypeError(
                "lora_linear: expected tensors of this process alone, found a DTensor: fastlora has no tensor "
                "parallelism; and layers of a model that FSDP2 has sharded are called through the model"
            )
