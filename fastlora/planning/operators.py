"""Operators that torch computes for more inputs than its rules of shapes let through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class GroupedProducts(TorchDispatchMode):
    """Gives grouped products of tensors without data their shape in any dtype; torch has a rule for bfloat16 alone."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_product(
    x: Tensor, w: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`x W` per group: `offs` `[G]` bounds the groups along the one axis that x or w has not of its own."""
    rows, columns = x.shape[-2], w.shape[-1]
    if x.dim() == w.dim():
        groups = x.shape[0] if x.dim() == 3 else offs.shape[0] if offs is not None else 1
        return x.new_empty(groups, rows, columns, dtype=out_dtype or x.dtype)
    return x.new_empty(rows, columns, dtype=out_dtype or x.dtype)
