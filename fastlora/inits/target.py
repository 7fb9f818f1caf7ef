"""What every initialisation starts from and what it ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..layers import LinearLayer, is_linear8bit, kind_of, read_int8
from ..layers.base import Parts
from ..models.targets import pattern_value


@dataclass(frozen=True)
class Initial:
    """An adapter at step 0.

    Attributes:
        a, b: `[R, K]` and `[N, R]`, float32.
        weight: the new frozen weight `[N, K]` in the dtype of the dense one, or None where that stays.
    """

    a: Tensor
    b: Tensor
    weight: Tensor | None = None

    def parts(self, bias: bool) -> Parts:
        """The adapter's tensors by the names they have in PEFT's files; B's bias, where it has one, starts at zero."""
        parts = {"lora_A.weight": self.a, "lora_B.weight": self.b}
        return parts | {"lora_B.bias": torch.zeros(self.b.shape[0])} if bias else parts


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter, with the adapter's rank and scaling."""

    name: str
    module: Any
    rank: int
    scaling: float

    @property
    def is_int8(self) -> bool:
        if isinstance(self.module, LinearLayer):
            return self.module.weight_scale is not None
        return is_linear8bit(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dense weight."""
        if isinstance(self.module, LinearLayer):
            return self.module.dense_dtype
        return torch.float16 if is_linear8bit(self.module) else self.module.weight.dtype

    def dense(self) -> Tensor:
        """The frozen weight `[N, K]` in float32 or wider."""
        weight, scale = _frozen(self.module)
        if scale is not None:
            return weight.detach().float() * scale.detach().float()[:, None]
        return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _frozen(module: Any) -> tuple[Tensor, Tensor | None]:
    """The weight `[N, K]` and its scale where it is int8."""
    if isinstance(module, LinearLayer):
        return module.frozen_weight, module.weight_scale
    if is_linear8bit(module):
        return read_int8(module) or (module.weight, None)
    return (module.weight if isinstance(module, nn.Linear) else module.weight.T), None


def make_targets(modules: dict[str, Any], config: LoraConfig) -> list[Target]:
    """The targets with the ranks and scalings of the config."""
    targets = []
    for name, module in modules.items():
        rank = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        targets.append(Target(name, module, rank, config.scaling(rank, alpha)))
    return targets


def features(module: Any) -> tuple[int, int]:
    """out_features and in_features of a target."""
    kind: Any = kind_of(module)
    return kind.features(module)


def draw(target: Target) -> tuple[Tensor, Tensor]:
    """A `[R, K]` and B `[N, R]` as two new linear layers have them: what PEFT draws first, whatever the method."""
    kind: Any = kind_of(target.module)
    a, b = kind.new_modules(target.module, target.rank, False, "meta" if target.module.weight.is_meta else "cpu")
    return a.weight.data, b.weight.data


def rounded(target: Target, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in float32, rounded to the dtype of a dense weight, where PEFT has a new adapter at first."""
    dtype = target.module.weight.dtype if target.module.weight.is_floating_point() else a.dtype
    return a.to(dtype).float(), b.to(dtype).float()


def moved_into_adapter(target: Target, weight: Tensor, a: Tensor, b: Tensor) -> Initial:
    """The adapter A, B and what it leaves of `weight` `[N, K]`: `W - scaling * B A`, computed in the dtype of `weight`.

    The layer computes what it did, up to the rounding of the new weight.
    """
    residual = weight - (target.scaling * b) @ a
    return Initial(a.float(), b.float(), residual.to(target.dtype))
