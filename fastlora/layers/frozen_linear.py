"""The weight of a frozen linear layer, dense or int8, and folding adapters into it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from . import dora
from .base import LoraLayer, Parts
from .bitsandbytes import is_linear8bit, restore_linear8bit, take_int8
from .draw import draw_pair
from .fold import Fold, row_blocks
from .folding import Parameters
from .original import Original, restore_weight
from .pages import release_pages


class FrozenLinear(LoraLayer):
    """A frozen linear layer `W x + bias`, dense or int8, with LoRA adapters.

    Attributes:
        weight: the frozen weight; int8 `[N, K]` where `weight_scale` is not None.
        weight_scale: float `[N]` for an int8 weight, else None.
        original: the weight from before an adapter's initialisation changed it, where one did.
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
    def new_modules(cls, module: Any, rank: int, bias: bool, device: str) -> tuple[Any, Any]:
        """Modules with weights of the shapes of A and B, made in PEFT's order; `bias` is for B."""
        N, K = cls.features(module)
        a = nn.Linear(K, rank, bias=False, device=device)
        return a, nn.Linear(rank, N, bias=bias, device=device)

    @classmethod
    def draw(cls, module: Any, rank: int, init: bool | str, bias: bool) -> Parts:
        a, b = cls.new_modules(module, rank, bias, "meta" if module.weight.is_meta else "cpu")
        return draw_pair(a, b, rank, init)

    def setup(self) -> None:
        self.original: Original | None = None
        self.register_parameter("weight_scale", None)
        self.register_buffer("weight_squares", None, persistent=False)
        if self.original_class.__name__ == "Linear8bitLt" and (int8 := take_int8(self)) is not None:
            self.set_int8(*int8)

    def _row_factor(self, adapter: str) -> Tensor:
        """DoRA's `m / ||W + s B A||`, float32 `[N]`."""
        return self.lora_magnitude[adapter].flatten() / self._row_norm(adapter)

    def _row_norm(self, adapter: str) -> Tensor:
        a, b = self._matrices(adapter)
        return dora.row_norm(
            self.weight_squares, self.frozen_weight, self.weight_scale, a, b, self.scaling[adapter]
        )  # fmt: skip

    def _has_bias(self, adapters: tuple[str, ...]) -> bool:
        return any(adapter in self.lora_B_bias for adapter in adapters)

    def _bias_of(self, adapters: tuple[str, ...]) -> Tensor:
        """`sum over adapters of scaling * bias of B`."""
        with_bias = [adapter for adapter in adapters if adapter in self.lora_B_bias]
        return torch.stack([self.scaling[adapter] * self.lora_B_bias[adapter] for adapter in with_bias]).sum(dim=0)

    def _matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """A and B of an adapter as `[R, K]` and `[N, R]`."""
        return self.lora_A[adapter], self.lora_B[adapter]

    def _stacked(self, adapters: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """A and B of adapters as those of one adapter with scaling 1."""
        matrices = {adapter: self._matrices(adapter) for adapter in adapters}
        a = torch.cat([a for a, _ in matrices.values()])
        b = torch.cat([self.scaling[adapter] * b for adapter, (_, b) in matrices.items()], dim=1)
        return a, b

    def add_adapter(self, name: str, parts: Parts, scaling: float, dropout: float, trainable: bool = True) -> None:
        super().add_adapter(name, parts, scaling, dropout, trainable)
        if name in self.lora_magnitude and self.weight_squares is None:
            self.weight_squares = dora.squared_rows(self.frozen_weight, self.weight_scale)

    def add_magnitude(self, adapter: str, trainable: bool = True) -> None:
        self.weight_squares = dora.squared_rows(self.frozen_weight, self.weight_scale)
        magnitude = self._row_norm(adapter).view(self.shapes(self, 1)["lora_magnitude_vector"])
        self.lora_magnitude[adapter] = nn.Parameter(magnitude, requires_grad=trainable)

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        restore_weight(self)  # where an initialisation changed it, there was this adapter alone

    def disable(self) -> None:
        super().disable()
        self._exchange_original()

    def enable(self) -> None:
        self._exchange_original()
        super().enable()

    def _exchange_original(self) -> None:
        """Puts the original weight in the place of what an initialisation left of it, or that back."""
        if self.original is not None:
            parameters = {"weight": self.original.weight, "weight_scale": self.original.weight_scale}
            before: dict[str, Any] = self.exchange(parameters)
            self.original = replace(self.original, **before)

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

    def folds(self, adapters: tuple[str, ...]) -> list[Fold]:
        return [self._fold(adapters)]

    def folded_besides(self, adapters: tuple[str, ...]) -> Parameters:
        return self._folded_bias(adapters)

    @torch.no_grad()
    def _folded_bias(self, adapters: tuple[str, ...]) -> dict[str, nn.Parameter | None]:
        if not self._has_bias(adapters):
            return {}
        added = self._bias_of(adapters)
        return _frozen_parameters(
            bias=added.to(self.dense_dtype) if self.bias is None else (self.bias + added).to(self.bias.dtype)
        )

    @torch.no_grad()
    def _fold(self, adapters: tuple[str, ...]) -> Fold:
        """What adapters add to the weight.

        Each DoRA adapter adds `(factor - 1) W + factor s B A`, so that all of them scale the rows of W together.
        """
        scale_name = None if self.weight_scale is None else "weight_scale"
        factors = {adapter: self._row_factor(adapter) for adapter in adapters if adapter in self.lora_magnitude}
        if len(adapters) == 1 and not factors:
            a, b = (tensor.detach() for tensor in self._matrices(adapters[0]))
            return Fold("weight", a, b, self.scaling[adapters[0]], None, self._matrix, scale_name)
        a, b = self._stacked(adapters)
        if not factors:
            return Fold("weight", a, b, 1.0, None, self._matrix, scale_name)
        b = torch.cat([
            self.scaling[adapter] * self._matrices(adapter)[1] * factors.get(adapter, b.new_ones(1))[:, None]
            for adapter in adapters
        ], dim=1)  # fmt: skip
        rows = 1 + torch.stack([factor - 1 for factor in factors.values()]).sum(dim=0)
        return Fold("weight", a, b, 1.0, rows[:, None], self._matrix, scale_name)

    @torch.no_grad()
    def dense_weight(self, adapters: tuple[str, ...] = ()) -> Tensor:
        """The frozen weight as the original module stores it, with adapters folded in before any rounding."""
        weight, w_scale = self.weight.detach(), self.weight_scale
        if w_scale is None and not adapters:
            return self._stored(self.frozen_weight.detach()).to(self.dense_dtype)
        fold = self._fold(adapters) if adapters else None
        w = self._matrix(weight)
        if w_scale is None:
            dense = torch.empty_like(weight, dtype=self.dense_dtype, memory_format=torch.contiguous_format)
            out = self._matrix(dense)
        else:
            out = torch.empty(w.shape, dtype=self.dense_dtype, device=w.device)
            dense = self._stored(out)
        for rows in row_blocks(w):
            block = w[rows] if w_scale is None else w[rows].float() * w_scale[rows].float()[:, None]
            out[rows] = block if fold is None else fold.rows(rows, block, None)[0]
        return dense

    def release(self, merge: bool = False) -> None:
        """Turns the module back into what it was, with the active adapters folded in if `merge`.

        A weight that fastlora quantised is dequantised; one that came from bitsandbytes stays int8.
        """
        adapters = (self.merged_adapters or self.active_adapters) if merge else ()
        if not merge:
            self.unmerge()
            restore_weight(self)
        if self.original_class.__name__ == "Linear8bitLt":
            super().release(merge)
            return
        if merge and not self.keeps_base:
            adapters = ()  # they are in the weight for good
        else:
            self.unmerge()
        if self.weight_scale is not None or adapters:
            self.exchange(self._folded_bias(adapters))
            self.exchange(_frozen_parameters(weight=self.dense_weight(adapters), weight_scale=None))
        self._become_original()

    def _become_original(self) -> None:
        int8 = self.weight.data, self.weight_scale
        self.__dict__.pop("threshold", None)
        super()._become_original()
        del self.original, self._parameters["weight_scale"], self._buffers["weight_squares"]
        self._non_persistent_buffers_set.discard("weight_squares")
        if is_linear8bit(self):
            restore_linear8bit(self, *int8)

    def _stored(self, weight: Tensor) -> Tensor:
        """A dense `[N, K]` weight in the layout of the original module."""
        return weight

    def _matrix(self, stored: Tensor) -> Tensor:
        """A weight as the layer stores it, with one row per row of a `Fold`."""
        return stored


def _frozen_parameters(**tensors: Tensor | None) -> dict[str, nn.Parameter | None]:
    return {name: None if t is None else nn.Parameter(t, requires_grad=False) for name, t in tensors.items()}
