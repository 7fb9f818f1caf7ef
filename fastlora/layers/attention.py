"""`nn.MultiheadAttention` with adapters on the weights of its projections.

The module has no linear layers to call: it hands `in_proj_weight` `[3 E, E]` and `out_proj.weight` `[E, E]` to one
function. Whoever reads them, this module or the fused paths of `nn.TransformerEncoderLayer`, gets `W + s B A`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .adapted import Term, folds_of
from .base import Parts
from .draw import draw_pair
from .fold import Fold
from .reader import WeightLayer, adapt_parameter, release_parameter


class LoraAttention(WeightLayer):
    """`nn.MultiheadAttention` with LoRA adapters, each on the input and on the output projection.

    Attributes:
        lora_A_out, lora_B_out: as lora_A and lora_B, for the output projection.
    """

    PARTS: ClassVar[dict[str, str]] = {
        "lora_A.weight": "lora_A",
        "lora_B.weight": "lora_B",
        "base_layer.out_proj.lora_A.weight": "lora_A_out",
        "base_layer.out_proj.lora_B.weight": "lora_B_out",
    }

    lora_A_out: nn.ParameterDict
    lora_B_out: nn.ParameterDict
    in_proj_weight: Any
    out_proj: Any

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward

    @classmethod
    def check(cls, module: Any, name: str, rank: int, dropout: float, dora: bool, bias: bool) -> None:
        super().check(module, name, rank, dropout, dora, bias)
        if module._parameters["in_proj_weight"] is None:
            raise ValueError(
                f"targets: expected one width for query, key and value, found embed_dim={module.embed_dim}, "
                f"kdim={module.kdim} and vdim={module.vdim} at {name!r}"
            )

    @classmethod
    def shapes(cls, module: Any, rank: int) -> dict[str, list[int]]:
        E = module.embed_dim
        return dict(zip(cls.PARTS, ([rank, E], [3 * E, rank], [rank, E], [E, rank]), strict=True))

    @classmethod
    def dtype_of(cls, module: Any) -> torch.dtype:
        return module.out_proj._parameters["weight"].dtype

    @classmethod
    def draw(cls, module: Any, rank: int, init: bool | str, bias: bool) -> Parts:
        E, device = module.embed_dim, "meta" if module._parameters["in_proj_weight"].is_meta else "cpu"

        def draw_projection(N: int) -> Parts:
            a = nn.Linear(E, rank, bias=False, device=device)
            return draw_pair(a, nn.Linear(rank, N, bias=False, device=device), rank, init)

        draw_projection(E)  # PEFT draws the output projection twice
        projections = draw_projection(3 * E), draw_projection(E)
        return dict(zip(cls.PARTS, (tensor for parts in projections for tensor in parts.values()), strict=True))

    def setup(self) -> None:
        adapt_parameter(self, "in_proj_weight", self)
        adapt_parameter(self.out_proj, "weight", self)

    def terms(self, name: str) -> list[Term]:
        return self._terms(name, self.running_adapters())

    def _terms(self, name: str, adapters: tuple[str, ...]) -> list[Term]:
        a, b = (self.lora_A, self.lora_B) if name == "in_proj_weight" else (self.lora_A_out, self.lora_B_out)
        return [(b[adapter], a[adapter], self.scaling[adapter]) for adapter in adapters]

    def folds(self, adapters: tuple[str, ...]) -> list[Fold]:
        weights = {"in_proj_weight": "in_proj_weight", "out_proj.weight": "weight"}
        return [
            fold
            for path, own in weights.items()
            for fold in folds_of(path, self._parameter(path), self._terms(own, adapters))
        ]

    def _become_original(self) -> None:
        release_parameter(self.out_proj, "weight")
        release_parameter(self, "in_proj_weight")
        super()._become_original()
