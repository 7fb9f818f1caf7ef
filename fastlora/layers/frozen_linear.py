"""The weight of a frozen linear layer, dense or int8, and folding adapters into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..pages import release_pages
from . import dora
from .base import LoraLayer, Parts
from .bitsandbytes import is_linear8bit, restore_linear8bit, take_int8
from .draw import draw_pair


class FrozenLinear(LoraLayer):
    """A frozen linear layer `W x + bias`, dense or int8, with LoRA adapters.

    Attributes:
        weight: the frozen weight; int8 `[N, K]` where `weight_scale` is not None.
        weight_scale: float `[N]` for an int8 weight, else None.
    """

    in_features: Any
    out_features: Any
    weight: Any
    weight_scale: nn.Parameter | None
    bias: Any
    weight_squares: Any

    @property
    def frozen_weight(self) -> Tensor:
        """The weight as `[N, K]`, merged or not."""
        raise NotImplementedError

    @classmethod
    def features(cls, module: Any) -> tuple[int, int]:
        """out_features and in_features."""
        return module.out_features, module.in_features

    @classmethod
    def shapes(cls, module: Any, rank: int) -> dict[str, list[int]]:
        N, K = cls.features(module)
        return {
            "lora_A.weight": [rank, K], "lora_B.weight": [N, rank], "lora_B.bias": [N], "lora_magnitude_vector": [N],
        }  # fmt: skip

    @classmethod
    def class_for(cls, original: type[nn.Module]) -> type[LoraLayer]:
        return cls

    @classmethod
    def draw(cls, module: Any, rank: int, init: bool | str, bias: bool) -> Parts:
        N, K = cls.features(module)
        device = "meta" if module.weight.is_meta else "cpu"
        a = nn.Linear(K, rank, bias=False, device=device)
        return draw_pair(a, nn.Linear(rank, N, bias=bias, device=device), rank, init)

    def setup(self) -> None:
        self.register_parameter("weight_scale", None)
        self.register_buffer("weight_squares", None, persistent=False)
        if self.original_class.__name__ == "Linear8bitLt" and (int8 := take_int8(self)) is not None:
            self.set_int8(*int8)

    def _row_factor(self, adapter: str) -> Tensor:
        """DoRA's `m / ||W + s B A||`, float32 `[N]`."""
        return self.lora_magnitude[adapter] / self._row_norm(adapter)

    def _row_norm(self, adapter: str) -> Tensor:
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        return dora.row_norm(
            self.weight_squares, self.frozen_weight, self.weight_scale, a, b, self.scaling[adapter]
        )  # fmt: skip

    def _has_bias(self, adapters: tuple[str, ...]) -> bool:
        return any(adapter in self.lora_B_bias for adapter in adapters)

    def _bias_of(self, adapters: tuple[str, ...]) -> Tensor:
        """`sum over adapters of scaling * bias of B`."""
        with_bias = [adapter for adapter in adapters if adapter in self.lora_B_bias]
        return torch.stack([self.scaling[adapter] * self.lora_B_bias[adapter] for adapter in with_bias]).sum(dim=0)

    def _stacked(self, adapters: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A and B of adapters as those of one adapter with scaling 1."""
        a = torch.cat([self.lora_A[adapter] for adapter in adapters])
        b = torch.cat([self.scaling[adapter] * self.lora_B[adapter] for adapter in adapters], dim=1)
        return a, b

    def add_adapter(self, name: str, parts: Parts, scaling: float, dropout: float, trainable: bool = True) -> None:
        super().add_adapter(name, parts, scaling, dropout, trainable)
        if name in self.lora_magnitude and self.weight_squares is None:
            self.weight_squares = dora.squared_rows(self.frozen_weight, self.weight_scale)

    def add_magnitude(self, adapter: str, trainable: bool = True) -> None:
        self.weight_squares = dora.squared_rows(self.frozen_weight, self.weight_scale)
        self.lora_magnitude[adapter] = nn.Parameter(self._row_norm(adapter), requires_grad=trainable)

    def quantize(self) -> None:
        """Replaces the dense weight by int8 codes and a scale per output feature."""
        dense = self.weight.data
        self.set_int8(*ops.quantize_rows(self.frozen_weight))
        release_pages(dense)

    def set_int8(self, q: Tensor, scale: Tensor) -> None:
        self.weight = nn.Parameter(q, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        if self.weight_squares is not None:
            self.weight_squares = dora.squared_rows(q, scale)

    @torch.no_grad()
    def folded(self, adapters: tuple[str, ...]) -> dict[str, nn.Parameter | None]:
        weight, weight_scale = self._merged(self.frozen_weight, self.weight_scale, adapters)
        if self.weight_scale is None:
            merged = _frozen_parameters(weight=self._stored(weight))
        else:
            merged = _frozen_parameters(weight=weight, weight_scale=weight_scale)
        return merged | self._folded_bias(adapters)

    @torch.no_grad()
    def _folded_bias(self, adapters: tuple[str, ...]) -> dict[str, nn.Parameter | None]:
        if not self._has_bias(adapters):
            return {}
        added = self._bias_of(adapters)
        return _frozen_parameters(
            bias=added.to(self.dense_dtype) if self.bias is None else (self.bias + added).to(self.bias.dtype)
        )

    def _merged(self, w: Tensor, w_scale: Tensor | None, adapters: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Codes and scale, or the dense weight, with adapters folded in.

        Each DoRA adapter adds `(factor - 1) W + factor s B A`, so that all of them scale the rows of W together.
        """
        factors = {adapter: self._row_factor(adapter) for adapter in adapters if adapter in self.lora_magnitude}
        if len(adapters) == 1 and not factors:
            a, b = self.lora_A[adapters[0]].detach(), self.lora_B[adapters[0]].detach()
            return ops.merge_rows(w, w_scale, a, b, self.scaling[adapters[0]])
        a, b = (tensor.detach() for tensor in self._stacked(adapters))
        if not factors:
            return ops.merge_rows(w, w_scale, a, b, 1.0)
        b = torch.cat([
            self.scaling[adapter] * self.lora_B[adapter] * factors.get(adapter, b.new_ones(1))[:, None]
            for adapter in adapters
        ], dim=1)  # fmt: skip
        rows = 1 + torch.stack([factor - 1 for factor in factors.values()]).sum(dim=0)
        if w_scale is not None:
            return ops.merge_rows(w, w_scale * rows, a, b, 1.0)
        merged, scale = ops.merge_rows(w.float() * rows[:, None], None, a, b, 1.0)
        return merged.to(w.dtype), scale

    def dense_weight(self, adapters: tuple[str, ...] = ()) -> Tensor:
        """The frozen weight as the original module stores it, with adapters folded in before any rounding."""
        weight = self.frozen_weight
        if self.weight_scale is not None:
            weight = weight.float() * self.weight_scale.float()[:, None]
        if adapters:
            weight, _ = self._merged(weight, None, adapters)
        return self._stored(weight.to(self.dense_dtype))

    def release(self, merge: bool = False) -> None:
        """Turns the module back into what it was, with the active adapters folded in if `merge`.

        A weight that fastlora quantised is dequantised; one that came from bitsandbytes stays int8.
        """
        adapters = (self.merged_adapters or self.active_adapters) if merge else ()
        if self.original_class.__name__ == "Linear8bitLt":
            super().release(merge)
            return
        self.unmerge()
        if self.weight_scale is not None or adapters:
            self.exchange(self._folded_bias(adapters))
            self.exchange(_frozen_parameters(weight=self.dense_weight(adapters), weight_scale=None))
        self._become_original()

    def _become_original(self) -> None:
        int8 = self.weight.data, self.weight_scale
        super()._become_original()
        del self._parameters["weight_scale"], self._buffers["weight_squares"]
        self._non_persistent_buffers_set.discard("weight_squares")
        if is_linear8bit(self):
            restore_linear8bit(self, *int8)

    def _stored(self, weight: Tensor) -> Tensor:
        """A dense `[N, K]` weight in the layout of the original module; its own inverse."""
        return weight


def _frozen_parameters(**tensors: Tensor | None) -> dict[str, nn.Parameter | None]:
    return {name: None if t is None else nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}
