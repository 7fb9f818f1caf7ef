"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` with LoRA adapters.

    y = W * x + bias + scale * B * (A * dropout(x))

where `*` is convolution: A has R output channels and the kernel, stride, padding and dilation of W, and B a kernel of
one point. That is a linear layer of the patches of x, with W, A and B flattened from their second axis on.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .branch import dropout
from .frozen_linear import FrozenLinear

_MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_FUNCTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLayer(FrozenLinear):
    """A frozen convolution with LoRA adapters.

    With groups, A reads every input channel and B has the groups. What they add then is no grouped convolution, so
    such an adapter cannot be folded into the weight and has no DoRA.
    """

    DIMENSIONS: int  # of the kernel

    groups: Any
    stride: Any
    padding: Any
    padding_mode: Any
    dilation: Any
    _reversed_padding_repeated_twice: Any

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        original: Any = type(module)
        plain = _MODULES[cls.DIMENSIONS]
        return (
            isinstance(module, plain)
            and original.forward is plain.forward
            and original._conv_forward is plain._conv_forward
        )

    @classmethod
    def check(cls, module: Any, name: str, rank: int, dropout: float, dora: bool, bias: bool) -> None:
        if rank % module.groups:
            raise ValueError(
                f"r: expected a multiple of the groups of a convolution, {module.groups} at {name!r}, found {rank}"
            )
        if dora and module.groups > 1:
            raise ValueError(f"use_dora: expected convolutions without groups, found {module.groups} at {name!r}")

    @classmethod
    def features(cls, module: Any) -> tuple[int, int]:
        return module.out_channels, module.weight[0].numel()

    @classmethod
    def shapes(cls, module: Any, rank: int) -> dict[str, list[int]]:
        N, point = module.out_channels, [1] * cls.DIMENSIONS
        return {
            "lora_A.weight": [rank, module.in_channels, *module.kernel_size],
            "lora_B.weight": [N, rank // module.groups, *point],
            "lora_B.bias": [N],
            "lora_magnitude_vector": [1, N, *point],
        }

    @classmethod
    def new_modules(cls, module: Any, rank: int, bias: bool, device: str) -> tuple[Any, Any]:
        conv = _MODULES[cls.DIMENSIONS]
        a = conv(module.in_channels, rank, module.kernel_size, bias=False, device=device)
        return a, conv(rank, module.out_channels, 1, groups=module.groups, bias=bias, device=device)

    @property
    def frozen_weight(self) -> Tensor:
        return self.weight.flatten(1)

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.view(self.weight.shape)

    def _matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter].flatten(1), self.lora_B[adapter].flatten(1)

    def check_fold(self, adapters: tuple[str, ...]) -> None:
        if self.groups > 1:
            raise ValueError(f"expected a convolution without groups to fold an adapter into, found {self.groups}")

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for adapter in self.running_adapters():
            y = y + self._added(x, adapter)
        return y

    def _added(self, x: Tensor, adapter: str) -> Tensor:
        """What one adapter adds to the frozen layer's output."""
        x = dropout(x, self.lora_dropout[adapter] if self.training else 0.0)
        a, b = self.lora_A[adapter], self.scaling[adapter] * self.lora_B[adapter]
        hidden = self._convolve(x, a.to(x.dtype))
        added = _FUNCTIONS[self.DIMENSIONS](hidden, b.to(hidden.dtype), groups=self.groups)
        if adapter in self.lora_magnitude:
            factor = self._per_channel(self._row_factor(adapter))
            frozen = self._convolve(x, self.weight)
            added = (factor - 1).to(frozen.dtype) * frozen + factor.to(frozen.dtype) * added
        if self._has_bias((adapter,)):
            added = added + self._per_channel(self._bias_of((adapter,))).to(added.dtype)
        return added

    def _convolve(self, x: Tensor, w: Tensor) -> Tensor:
        """x with a kernel that has no groups, moved over it as the layer's own."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return _FUNCTIONS[self.DIMENSIONS](x, w, None, self.stride, padding, self.dilation)

    def _per_channel(self, values: Tensor) -> Tensor:
        """`[N]` as it broadcasts over the layer's output."""
        return values.view(-1, *[1] * self.DIMENSIONS)


class LoraConvolution1d(ConvLayer, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d` with LoRA adapters."""

    DIMENSIONS = 1


class LoraConvolution2d(ConvLayer, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with LoRA adapters."""

    DIMENSIONS = 2


class LoraConvolution3d(ConvLayer, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d` with LoRA adapters."""

    DIMENSIONS = 3
