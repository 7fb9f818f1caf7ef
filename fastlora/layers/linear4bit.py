"""The 4-bit linear layers of bitsandbytes (QLoRA, Dettmers et al. 2023), in place, with LoRA adapters.

The frozen product is `bitsandbytes.matmul_4bit`: it multiplies by the codes, or dequantises for one product, and its
backward does so again, so that no dense weight is ever kept. The module's own forward is not called: on some CPUs that
repacks the codes for inference, in place, with scales rounded to bfloat16, after which there is no backward.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .base import LoraLayer, class_of
from .bitsandbytes import is_linear4bit
from .branch import low_rank
from .fold import Fold
from .folding import Parameters
from .linear import LinearLayer
from .mixed import Mix


class LoraLinear4bit(LinearLayer):
    """`Linear4bit` with LoRA adapters.

    Attributes:
        weight: the codes, a `Params4bit` whose `quant_state` has their scales.
        quant_state: the same state.
        compute_dtype: what bitsandbytes casts the input to where `compute_type_is_set`.
    """

    quant_state: Any
    compute_dtype: torch.dtype | None
    compute_type_is_set: bool

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return is_linear4bit(module)

    @classmethod
    def class_for(cls, original: type[nn.Module]) -> type[LoraLayer]:
        return class_of(cls, original)

    @classmethod
    def dtype_of(cls, module: Any) -> torch.dtype:
        return torch.float32 if module.compute_dtype is None else module.compute_dtype

    def setup(self) -> None:
        super().setup()
        if getattr(self._state, "packing_format_for_cpu", False):
            self.state_dict()  # bitsandbytes unpacks for it, in place

    def computed_by(self, place: ops.Place | None = None) -> str:
        return "codes of 4 bits by bitsandbytes, adapters by PyTorch"

    @property
    def _state(self) -> Any:
        """The scales; a weight that was sharded has lost its own reference."""
        return getattr(self.weight, "quant_state", self.quant_state)

    @property
    def frozen_weight(self) -> Tensor:
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(self.weight.data, self._state)

    def forward(self, x: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        if bias is None or not bias.requires_grad:
            return self._linear(x, bias)
        return self._linear(x, None) + bias.to(x.dtype)

    def _linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.mix is not None and self.adapters_enabled:
            return self._mixed(x, bias, self.mix)
        adapters = self.running_adapters()
        drops = self.training and any(self.lora_dropout[adapter] for adapter in adapters)
        if len(adapters) == 1 and adapters[0] in self.lora_magnitude and not drops:
            return self._dora(x, bias, adapters[0])
        y = self._frozen(x, bias)
        for adapter in adapters:
            y = y + self._added(x, adapter)
        return y

    def _mixed(self, x: Tensor, bias: Tensor | None, mix: Mix) -> Tensor:
        """The frozen product of all rows, then each run of rows of one adapter with its low-rank part."""
        B, M = mix.rows.shape[0], x.numel() // x.shape[-1]
        if M % B:
            raise ValueError(f"mixed: expected a batch of {B} rows, as adapters were given for, found {M} tokens")
        y = self._frozen(x, bias)
        x_rows, y_rows = x.reshape(B, M // B, -1), y.reshape(B, M // B, -1)
        parts = [
            y_rows[run] if name is None else y_rows[run] + self._added(x_rows[run], name) for name, run in mix.runs
        ]
        return torch.cat(parts).view(y.shape)

    def _frozen(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        import bitsandbytes

        dtype = self.compute_dtype if self.compute_type_is_set and self.compute_dtype is not None else x.dtype
        bias = None if bias is None else bias.to(dtype)
        y = bitsandbytes.matmul_4bit(x.to(dtype), self.weight, self._state, bias=bias)
        return y.to(x.dtype)

    def _dora(self, x: Tensor, bias: Tensor | None, adapter: str) -> Tensor:
        added = self.scaling[adapter] * low_rank(x, self.lora_A[adapter], self.lora_B[adapter])
        y = (self._frozen(x) + added) * self._row_factor(adapter).to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _operands(self, fold: Fold) -> tuple[Tensor, None]:
        return self.frozen_weight.float(), None

    @torch.no_grad()
    def folded(self, adapters: tuple[str, ...], untouchable: Collection[int] | None = None) -> Parameters:
        """The dequantised weight with adapters added, quantised again from float32 as in PEFT.

        Scales of the scales are those of the whole matrix, so all of it is dequantised at once.
        """
        dense = self.frozen_weight.float()
        self._fold(adapters).write(dense, None, dense, None)
        settings = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {name: getattr(self.weight, name) for name in settings}
        weight = type(self.weight)(dense, requires_grad=False, **options).to(dense.device)
        weight.quant_state.dtype = self._state.dtype
        return {"weight": weight} | self._folded_bias(adapters)

    def exchange(self, parameters: Parameters) -> Parameters:
        before = super().exchange(parameters)
        self.quant_state = self.weight.quant_state
        self.quant_state.to(self.weight.device)
        return before

    def release(self, merge: bool = False) -> None:
        """Turns the module back into a `Linear4bit`, with the active adapters folded in if `merge`."""
        LoraLayer.release(self, merge)
