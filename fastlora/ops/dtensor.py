"""Tensors of which a process has a part."""

from __future__ import annotations

import sys
from typing import Any


def is_dtensor(tensor: Any) -> bool:
    # Where nothing has imported them there are none, and the import is not free.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
