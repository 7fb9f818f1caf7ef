"""An output head with 16-bit weights that computes its logits in float32."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops
from .base import rebind_hooked_forward


class Float32Head(nn.Linear):
    """`nn.Linear` with 16-bit weights, its own or tied, whose float32 output was never rounded to 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_float32(x, self.weight, self.bias)

    @classmethod
    def adopt(cls, head: Any) -> None:
        """Turns an `nn.Linear` into one, in place."""
        head.__class__ = cls
        rebind_hooked_forward(head)

    def release(self) -> None:
        """Turns it back."""
        head: Any = self
        head.__class__ = nn.Linear
        rebind_hooked_forward(head)
