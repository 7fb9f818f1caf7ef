"""Adapters on a module's own parameters, such as the fused weights of a mixture's experts.

For a parameter W `[E, out, in]` of E experts A is `[E * R, in]`, expert after expert, and B is `[out, R * E]`, of whose
columns each R-th part belongs to all experts, as in PEFT's files:

    W_e + s B_e A_e,  A_e = A.view(E, R, in)[e],  B_e = B.view(out, R, E)[:, :, e]

A parameter of two axes is `[out, in]`, that of one expert. A module that says `is_transposed` has `[E, in, out]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapted import Term, folds_of
from .base import LoraLayer, Parts, become
from .draw import draw_pair
from .fold import Fold
from .reader import WeightLayer, adapt_parameter, release_parameter

PREFIX = "lora_"


@dataclass(frozen=True)
class ParameterTarget:
    """A parameter of a module, in the place of a module where an adapter goes."""

    module: Any
    parameter: str

    @property
    def weight(self) -> Any:
        return self.module._parameters[self.parameter]

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter is `[E, in, out]`."""
        return self.weight.dim() == 3 and getattr(self.module, "is_transposed", False)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, out and in."""
        experts, rows, columns = self.weight.shape if self.weight.dim() == 3 else (1, *self.weight.shape)
        return (experts, columns, rows) if self.is_transposed else (experts, rows, columns)


class LoraParameter(WeightLayer):
    """The adapters of one parameter, in a submodule of the module that has it.

    Attributes:
        target: the parameter.
    """

    PARTS: ClassVar[dict[str, str]] = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}

    target: ParameterTarget

    @classmethod
    def accepts(cls, module: Any) -> bool:
        return isinstance(module, ParameterTarget)

    @classmethod
    def adopt(cls, target: ParameterTarget) -> LoraParameter:
        """The layer for a parameter, the present one if there is one."""
        adapted_by = target.module.__dict__.get("adapted_by", {})
        if target.parameter not in adapted_by:
            layer = become(nn.Module(), cls, target.weight.dtype).train(target.module.training)
            layer.__dict__["target"] = target  # no submodule of its own submodule
            target.module.add_module(PREFIX + target.parameter, layer)
            adapt_parameter(target.module, target.parameter, layer)
        return target.module.adapted_by[target.parameter]

    @classmethod
    def shapes(cls, module: Any, rank: int) -> dict[str, list[int]]:
        experts, N, K = module.sizes
        return {"lora_A.weight": [experts * rank, K], "lora_B.weight": [N, rank * experts]}

    @classmethod
    def draw(cls, module: Any, rank: int, init: bool | str, bias: bool) -> Parts:
        experts, N, K = module.sizes
        device = "meta" if module.weight.is_meta else "cpu"
        a = nn.Linear(K, rank * experts, bias=False, device=device)
        return draw_pair(a, nn.Linear(rank * experts, N, bias=bias, device=device), rank, init)

    @property
    def weight(self) -> Any:
        return self.target.weight

    @property
    def weight_device(self) -> torch.device:
        return self.weight.device

    def home(self, name: str) -> tuple[nn.Module, str]:
        return self.target.module, name

    def terms(self, name: str) -> list[Term]:
        return self._terms(self.running_adapters())

    def _terms(self, adapters: tuple[str, ...]) -> list[Term]:
        return [(*self._factors(adapter), self.scaling[adapter]) for adapter in adapters]

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """The two factors of the low-rank part in the layout of the parameter."""
        a, b, experts = self.lora_A[adapter], self.lora_B[adapter], self.target.sizes[0]
        if self.weight.dim() == 2:
            return b, a
        a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
        return (a.transpose(1, 2), b.transpose(1, 2)) if self.target.is_transposed else (b, a)

    def folds(self, adapters: tuple[str, ...]) -> list[Fold]:
        return folds_of(self.target.parameter, self.weight, self._terms(adapters))

    def name_in_files(self, name: str, adapter: str) -> str:
        """PEFT wraps the module once per parameter, the last one outermost."""
        names = list(self.target.module._parameters)
        later = names[names.index(self.target.parameter) + 1 :]
        adapted_by: dict[str, LoraLayer] = self.target.module.adapted_by
        outside = sum(other in adapted_by and adapted_by[other].has(adapter) for other in later)
        return name.rpartition(".")[0] + ".base_layer" * outside

    def name_in_config(self, name: str) -> str:
        return f"{name.rpartition('.')[0]}.{self.target.parameter}"

    def _become_original(self) -> None:
        release_parameter(self.target.module, self.target.parameter)
        delattr(self.target.module, PREFIX + self.target.parameter)

    def extra_repr(self) -> str:
        experts, N, K = self.target.sizes
        ranks = ", ".join(f"{name}: r={a.shape[0] // experts}" for name, a in self.lora_A.items())
        return f"{self.target.parameter}, experts={experts}, in={K}, out={N}, adapters=({ranks})"
