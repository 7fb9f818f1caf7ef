"""Trainable tokens: some rows of an embedding train, and every layer with the same weight uses the trained ones.

An adapter holds whole rows `[T, D]`, as PEFT's files do, and not what they add: row `ids[t]` of the frozen weight is
replaced by row t. Nothing of the size of the weight is made unless the weight itself is read or merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .base import LoraLayer, Parts, become
from .embedding import check_embedding, is_embedding, scaled

ROWS = "token_adapter.trainable_tokens_delta"  # the name of the rows in PEFT's files


class TokenLayer(LoraLayer):
    """A frozen layer with a weight of one row per token, some of which an adapter replaces.

    Attributes:
        token_rows: trained rows `[T, D]` by adapter name; those of another layer in one that follows it.
        token_ids: the T tokens by adapter name, int64 `[T]`.
    """

    PARTS: ClassVar[dict[str, str]] = {ROWS: "token_rows"}

    token_rows: nn.ParameterDict
    token_ids: dict[str, Tensor]

    @classmethod
    def check_module(cls, module: Any, name: str) -> None:
        """Raises ValueError where the module's rows cannot be replaced."""

    def setup(self) -> None:
        self.__dict__["token_ids"] = {}

    def follow(self, other: TokenLayer) -> None:
        """Uses the rows of a layer with the same weight, which alone owns, saves and merges them."""
        del self.token_rows
        # Past nn.Module's registration: the rows are no parameters of this layer.
        self.__dict__["token_rows"], self.__dict__["token_ids"] = other.token_rows, other.token_ids

    @property
    def follows(self) -> bool:
        return "token_rows" in self.__dict__

    def add_rows(self, name: str, ids: Sequence[int], rows: Tensor, trainable: bool) -> None:
        """Adds an adapter with rows `[T, D]` for the tokens of these ids."""
        self.add_adapter(name, {ROWS: rows}, scaling=1.0, dropout=0.0, trainable=trainable)
        self.token_ids[name] = torch.tensor(ids, device=self.token_rows[name].device)

    @torch.no_grad()
    def initial_rows(self, ids: Sequence[int]) -> Parts:
        return {ROWS: self._parameters["weight"][list(ids)]}  # type: ignore[index]

    def has(self, adapter: str) -> bool:
        return adapter in self.token_rows

    def parts(self, adapter: str) -> dict[str, nn.Parameter]:
        return {} if self.follows else super().parts(adapter)

    def _by_adapter(self) -> list[Any]:
        return [*super()._by_adapter(), self.token_ids]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.token_ids.update({name: fn(ids) for name, ids in self.token_ids.items()})
        return self

    @property
    def weight(self) -> Any:
        """The weight with the running adapters' rows, for whoever reads it instead of calling the layer.

        The frozen parameter itself where none runs, or where it is a part of one, which only FSDP2 asks for.
        """
        parameter = self._parameters["weight"]
        return parameter if ops.is_dtensor(parameter) else self._with_rows(self.running_adapters())

    def _with_rows(self, adapters: tuple[str, ...]) -> Any:
        weight: Any = self._parameters["weight"]
        for adapter in adapters:
            weight = weight.index_copy(0, self.token_ids[adapter], self.token_rows[adapter].to(weight.dtype))
        return weight

    def check_active(self, adapters: tuple[str, ...]) -> None:
        """Raises ValueError where two adapters replace the row of one token."""
        owner: dict[int, str] = {}
        for adapter in adapters:
            for token in self.token_ids[adapter].tolist():
                if token in owner:
                    raise ValueError(
                        f"adapter: expected active adapters with different trainable tokens, found token {token} "
                        f"in {owner[token]!r} and {adapter!r}"
                    )
                owner[token] = adapter

    def check_fold(self, adapters: tuple[str, ...]) -> None:
        self.check_active(adapters)

    @torch.no_grad()
    def folded(self, adapters: tuple[str, ...]) -> dict[str, nn.Parameter | None]:
        return {} if self.follows else {"weight": nn.Parameter(self._with_rows(adapters), requires_grad=False)}

    def exchange(self, parameters: dict[str, nn.Parameter | None]) -> dict[str, nn.Parameter | None]:
        """Puts other values into parameters, which stay the same objects, so that layers that share them follow."""
        before: dict[str, nn.Parameter | None] = {}
        for name, parameter in parameters.items():
            own: Any = self._parameters[name]
            before[name] = nn.Parameter(own.data, requires_grad=False)
            own.data = parameter.data.to(own.device)  # type: ignore[union-attr]
        return before

    def _become_original(self) -> None:
        super()._become_original()
        del self.__dict__["token_ids"]

    def extra_repr(self) -> str:
        counts = ", ".join(f"{name}: {len(ids)}" for name, ids in self.token_ids.items())
        return f"{self.original_class.extra_repr(self)}, trainable_tokens=({counts})"


class TokenEmbedding(TokenLayer, nn.Embedding):  # type: ignore[misc, override]
    """`nn.Embedding`, or a subclass that scales its output, with trainable tokens."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return is_embedding(module)

    @classmethod
    def check_module(cls, module: Any, name: str) -> None:
        check_embedding(module, name, "trainable_token_indices")
        if module.scale_grad_by_freq:
            raise ValueError(
                "trainable_token_indices: expected an embedding without scale_grad_by_freq, whose gradient depends on "
                f"the other tokens of the batch, found it at {name!r}"
            )

    def forward(self, ids: Tensor) -> Tensor:
        running = self.running_adapters()
        if not running:
            return super().forward(ids)
        weight: Any = self._parameters["weight"]  # the attribute would copy it
        y = F.embedding(ids, weight)
        for adapter in running:
            y = self._replaced(y, ids.long(), adapter)
        return scaled(self, y)

    def _replaced(self, y: Tensor, ids: Tensor, adapter: str) -> Tensor:
        """Rows y of the tokens ids, with those of an adapter's tokens replaced."""
        tokens, order = self.token_ids[adapter].sort()
        place = torch.searchsorted(tokens, ids).clamp_max(len(tokens) - 1)
        found = tokens[place] == ids
        rows = F.embedding(order[place], self.token_rows[adapter].to(y.dtype))
        if self.padding_idx is not None:
            rows = torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)
        return torch.where(found[..., None], rows, y)


class TokenHead(TokenLayer, nn.Linear):  # type: ignore[misc, override]
    """`nn.Linear` over the vocabulary with trainable tokens, usually those of the embedding that has its weight."""

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        plain = isinstance(module, nn.Linear) and not isinstance(module, LoraLayer)
        return plain and type(module).forward is nn.Linear.forward

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self._parameters["weight"]  # the attribute would copy it
        y = F.linear(x, weight, self.bias)
        for adapter in self.running_adapters():
            ids, rows = self.token_ids[adapter], self.token_rows[adapter].to(weight.dtype)
            columns = F.linear(x, rows, None if self.bias is None else self.bias[ids])
            y = y.index_copy_(-1, ids, columns)
        return y


def token_kind(module: nn.Module) -> type[TokenLayer] | None:
    """The kind of layer with trainable tokens that a module is or can become; None where it can become none."""
    if torch.nn.utils.parametrize.is_parametrized(module):
        return None
    kinds: tuple[type[TokenLayer], ...] = (TokenEmbedding, TokenHead)
    return next((kind for kind in kinds if isinstance(module, kind) or kind.accepts(module)), None)


def adopt_tokens(module: Any) -> TokenLayer:
    """Turns a module that `token_kind` knows into a layer with trainable tokens in place; one that is stays so."""
    kind = token_kind(module)
    if isinstance(module, TokenLayer) or kind is None:
        return module
    return become(module, kind, module.weight.dtype)
