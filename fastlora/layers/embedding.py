"""`nn.Embedding` with LoRA adapters: the row of a token is `W[id] + scale * B A[:, id]`.

An embedding is a linear layer of one-hot vectors, with a matrix `W^T`: N is its dimension and K its number of rows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LoraLayer, Parts
from .branch import dropout
from .fold import Fold
from .frozen_linear import FrozenLinear


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows up and at most scales them by its `embed_scale`, as those of Gemma and BART do."""
    if not isinstance(module, nn.Embedding) or isinstance(module, LoraLayer):
        return False
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")


def scaled(module: Any, rows: Tensor) -> Tensor:
    """Rows times the `embed_scale` of an embedding that has one, computed as these embeddings do."""
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def check_embedding(module: Any, name: str, argument: str) -> None:
    """Raises ValueError for an embedding that rescales its weight as it is read, or has a scale per feature."""
    if module.max_norm is not None:
        raise ValueError(
            f"{argument}: expected an embedding without max_norm, which rescales frozen rows as they are read, "
            f"found max_norm={module.max_norm} at {name!r}"
        )
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        raise ValueError(
            f"{argument}: expected one number as embed_scale, found shape {tuple(scale.shape)} at {name!r}"
        )


class LoraEmbedding(FrozenLinear, nn.Embedding):  # type: ignore[misc]
    """`nn.Embedding`, or a subclass that scales its output, with LoRA adapters.

    `y = (W[ids] + scale * dropout(A^T[ids]) B^T) * embed_scale`, and DoRA over the features as for a linear layer.
    A has no gradient at `padding_idx`; `sparse` has no effect, since the weight that it is about is frozen.
    """

    PARTS: ClassVar[dict[str, str]] = {
        "lora_embedding_A": "lora_A",
        "lora_embedding_B": "lora_B",
        "lora_magnitude_vector": "lora_magnitude",
    }

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return is_embedding(module)

    @classmethod
    def check(cls, module: Any, name: str, rank: int, dropout: float, dora: bool, bias: bool) -> None:
        check_embedding(module, name, "targets")
        if bias:
            raise ValueError(f"lora_bias: expected no embeddings among the targets, as in PEFT, found {name!r}")

    @classmethod
    def features(cls, module: Any) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    @classmethod
    def shapes(cls, module: Any, rank: int) -> dict[str, list[int]]:
        N, K = cls.features(module)
        return {"lora_embedding_A": [rank, K], "lora_embedding_B": [N, rank], "lora_magnitude_vector": [N]}

    @classmethod
    def draw(cls, module: Any, rank: int, init: bool | str, bias: bool) -> Parts:
        N, K = cls.features(module)
        device = "meta" if module.weight.is_meta else "cpu"
        a, b = torch.randn(rank, K, device=device), torch.randn(N, rank, device=device)
        if init is not False:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        return {"lora_embedding_A": a, "lora_embedding_B": b}

    @property
    def frozen_weight(self) -> Tensor:
        return self.weight.T

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T

    def _fold(self, adapters: tuple[str, ...]) -> Fold:
        fold = super()._fold(adapters)  # row after row, as the weight lies in memory
        return replace(fold, a=fold.b.T, b=fold.a.T, factor=None if fold.factor is None else fold.factor.T)

    def _has_bias(self, adapters: tuple[str, ...]) -> bool:
        return False

    def forward(self, ids: Tensor) -> Tensor:
        frozen = y = super().forward(ids)
        for adapter in self.running_adapters():
            y = y + self._added(ids, frozen, adapter)
        return y

    def _added(self, ids: Tensor, frozen: Tensor, adapter: str) -> Tensor:
        """What one adapter adds to the frozen rows."""
        columns, b = self.lora_A[adapter].T, self.scaling[adapter] * self.lora_B[adapter]
        hidden = F.embedding(ids, columns, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)
        hidden = dropout(hidden, self.lora_dropout[adapter] if self.training else 0.0)
        added = scaled(self, F.linear(hidden.to(frozen.dtype), b.to(frozen.dtype)))
        if adapter not in self.lora_magnitude:
            return added
        factor = self._row_factor(adapter)
        return (factor - 1).to(frozen.dtype) * frozen + factor.to(frozen.dtype) * added
