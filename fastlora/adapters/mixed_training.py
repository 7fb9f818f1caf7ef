"""Training several adapters on one frozen model in one run, each on the rows of the data that name it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.distributed import processes
from .mixing import mix_rows, set_mix
from .registry import adapters, check_known, patched_layers

ROWS = "adapter_rows"  # in a batch: each row's adapter, an index into the names


@dataclass(frozen=True)
class MixedCollator:
    """A collator that turns the column with the rows' adapters into indices, and leaves the rest to another one.

    Attributes:
        collate: what makes a batch of the other columns.
        column: the name of an adapter in each row, or None for the frozen model.
        names: the adapters.
    """

    collate: Callable[[list[dict[str, Any]]], Any]
    column: str
    names: tuple[str, ...]

    def __call__(self, features: Sequence[Any]) -> Any:
        indices = [self._index(row) for row in features]
        batch = self.collate([{name: value for name, value in row.items() if name != self.column} for row in features])
        batch[ROWS] = torch.tensor(indices)
        return batch

    def _index(self, row: Any) -> int:
        if self.column not in row:
            raise ValueError(
                f"column: expected {self.column!r} in every row, found {sorted(row)}; transformers' Trainer keeps it "
                "with remove_unused_columns=False"
            )
        name = row[self.column]
        if name is not None and name not in self.names:
            raise ValueError(f"{self.column}: expected one of {list(self.names)} or None, found {name!r}")
        return -1 if name is None else self.names.index(name)


class MixedTraining:
    """Inside a `with` block, a batch of the model may say which adapter each of its rows uses and trains.

        for name in ("law", "code"):
            fastlora.patch(model, r=8, adapter=name)
        with fastlora.MixedTraining(model) as mixed:
            trainer = Trainer(
                model, TrainingArguments(..., remove_unused_columns=False, max_grad_norm=0.0), train_dataset=rows,
                data_collator=mixed.collator(default_data_collator), compute_loss_func=mixed.loss,
                optimizers=(AdamW(fastlora.adapter_groups(model, {"law": 1e-4, "code": 3e-4})), None),
            )
            trainer.train()
        fastlora.save(model, "adapters")  # adapters/law and adapters/code

    An adapter then gets the gradients that it would get alone with its rows, given `loss`, which is the sum of the
    adapters' own mean losses. What couples them is outside: one bound for the norm of all gradients (`max_grad_norm`;
    0 is none), and where gradients are accumulated, one weight per batch for all adapters. Dropout draws one mask for
    the batch, so a row's mask depends on its place there. In one process an optimizer passes over an adapter without
    rows in the batch; in several it steps on a gradient of zero, since each must reduce the same parameters.

    A loop of one's own passes `mixed.collator(...)(rows)` to the model; the mix holds until its next call, so that
    checkpointed activations are recomputed with it.

    Attributes:
        names: the adapters, those that `adapter_rows` of a batch are indices of.
        losses: the last batch's mean loss by adapter.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None, column: str = "adapter") -> None:
        """
        Args:
            names: the adapters that rows may name, by default all.
            column: where a row of the data has its adapter's name.

        Raises:
            ValueError: the model is not patched or has no adapter of a name.
        """
        patched_layers(model)
        self.model: Any = model
        self.names = tuple(adapters(model) if names is None else names)
        for name in self.names:
            check_known(model, name)
        self.column = column
        self.losses: dict[str, Tensor] = {}
        self._rows: Tensor | None = None
        self._hook: Any = None

    def __enter__(self) -> MixedTraining:
        self._hook = self.model.register_forward_pre_hook(torch.compiler.disable(self._take_rows), with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()
        set_mix(self.model, None)

    def collator(self, collate: Callable[[list[dict[str, Any]]], Any]) -> MixedCollator:
        """A collator for rows with the column, from one for rows without it."""
        return MixedCollator(collate, self.column, self.names)

    def _take_rows(self, model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        named = dict(named)
        self._rows = named.pop(ROWS, None)
        if self._rows is None:
            set_mix(model, None)
            return inputs, named
        rows, names = self._rows, self.names
        if processes() == 1:
            found = sorted(index for index in set(rows.tolist()) if index >= 0)
            lookup = torch.full((len(names) + 1,), -1, device=rows.device)  # the last is that of -1
            lookup[found] = torch.arange(len(found), device=rows.device)
            rows, names = lookup[rows], tuple(names[index] for index in found)
        mix_rows(model, rows, names)
        return inputs, named

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """`sum over adapters of the mean loss of their rows`, for `Trainer(compute_loss_func=...)`.

        Each is what the Trainer computes of these rows alone, with the model's own `loss_function`: the sum over
        labels, divided by their number. Rows without an adapter have none.

        Args:
            num_items_in_batch: how many labels there are in all batches of a step, in all processes; this batch then
                counts by its share of them.

        Raises:
            ValueError: the batch came without `adapter_rows`, or no row of it names an adapter.
        """
        if self._rows is None:
            raise ValueError(f"{ROWS}: expected in the batch, as MixedTraining.collator puts it there, found none")
        logits, own = outputs["logits"], (labels != -100).flatten(1).sum(dim=1)
        self.losses, total = {}, logits.new_zeros(())
        for index, name in enumerate(self.names):
            chosen = self._rows == index
            if chosen.any():
                loss = self.model.loss_function(
                    logits=logits[chosen], labels=labels[chosen], vocab_size=logits.shape[-1],
                    num_items_in_batch=own[chosen].sum().clamp_min(1),
                )  # fmt: skip
                self.losses[name] = loss.detach()
                total = total + loss
        if not self.losses and processes() == 1:
            raise ValueError(f"{self.column}: expected a row in each batch that names an adapter, found None alone")
        total = total + 0.0 * logits.sum()  # has gradients, of zero, in a process without such rows
        return total if num_items_in_batch is None else total * (own.sum() / num_items_in_batch)
