"""`fastlora.plan`: what a model with an adapter will be, from its config alone."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from ..adapters.registry import adapters
from ..config import LoraConfig
from ..inits import PLAIN_INITS
from ..ops import Place
from ..patch import patch
from .advice import find_notes, memory_note
from .optimizers import state_bytes
from .rows import Row, find_rows
from .sources import find_model
from .steps import StepMemory, step_memory


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        weights: what is frozen, and buffers.
        adapters: what trains.
        gradients: of what trains.
        optimizer: its state.
        activations: alive between forward and backward; None where the step could not be run.
        peak: the most alive at any moment, all of the above included. It leaves out what is not a tensor of the
            model's step: the allocator's gaps, scratch within a kernel, the context of a GPU, the data.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int | None
    peak: int | None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        model: the model's class.
        device, dtype: where and in which dtype it is to run.
        batch, length, checkpointing, optimizer: the step that `memory` is of.
        parameters, trainable: how many there are, and how many of them train.
        memory: bytes of that step.
        rows: the modules, those that repeat in one row.
        notes: what will not train, will not be fast, or was not counted, in sentences.
    """

    model: str
    device: str
    dtype: str
    batch: int
    length: int
    checkpointing: bool
    optimizer: str
    parameters: int
    trainable: int
    memory: Memory
    rows: list[Row]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists, numbers and strings, by these names: what `fastlora plan --json` prints."""
        return asdict(self)


def plan(
    model: nn.Module | str | PathLike[str] | Any,
    r: int = 8,
    targets: list[str] | str | None = None,
    *,
    dropout: float = 0.0,
    quantize: str | None = None,
    config: Any = None,
    batch: int = 1,
    length: int = 512,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    arch: int | None = None,
) -> Plan:
    """Says what computes each module, what trains, and the memory of a training step, without weights or downloads.

    The model is made on the meta device and patched there by `fastlora.patch`, so that every choice is the one made
    when it runs. The step's memory comes from a forward and a backward on tensors without data. Batches are taken to
    have no padding.

    Args:
        model: a transformers config, its config.json, the folder of a model or of an adapter, a hub id in the local
            cache, or a model, patched or not, which stays as it is.
        r, targets, dropout, quantize, config: as in `fastlora.patch`; where an adapter is, it has its own.
        batch, length: rows and tokens of a step.
        checkpointing: whether activations are recomputed in the backward.
        optimizer: "adamw", "adamw_8bit" (of bitsandbytes), "adafactor" or "sgd".
        dtype: of the weights, by default what the model's config says.
        device: where it is to run, by default a GPU if there is one. It need not be there.
        arch: the compute capability of a GPU that is not there as one number, such as 90 for an H100.

    Raises:
        ValueError, TypeError: an argument does not fit, as in `patch`.
    """
    _check_sizes(batch, length)
    state_bytes(optimizer, [])
    where = _device(device)
    source = find_model(model, dtype)
    found, own = source.model, source.adapter
    if own is not None or adapters(found):
        if (r, targets, dropout, config) != (8, None, 0.0, None) or (quantize and adapters(found)):
            raise ValueError("r, targets, dropout, config, quantize: expected none where an adapter is, found some")
        config = own
    if not adapters(found):
        config = _patch(found, r, targets, dropout, config, quantize)
    used = getattr(found, "dtype", None) or next(found.parameters()).dtype
    rows = find_rows(found, Place(where, batch * length, arch))
    notes = find_notes(source, rows, config, where, used, length)
    memory, problem = _memory(found, batch, length, checkpointing, optimizer)
    if memory.peak is not None:
        notes += memory_note(memory.peak, where)
    return Plan(
        model=type(found).__name__, device=str(where), dtype=str(used).removeprefix("torch."), batch=batch,
        length=length, checkpointing=checkpointing, optimizer=optimizer,
        parameters=sum(row.parameters for row in rows), trainable=sum(row.trainable for row in rows),
        memory=memory, rows=rows, notes=notes + problem,
    )  # fmt: skip


def _device(device: torch.device | str | None) -> torch.device:
    try:
        return torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        raise ValueError(f"device: expected one that torch knows, found {device!r}") from None


def _check_sizes(batch: int, length: int) -> None:
    for name, value in (("batch", batch), ("length", length)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, found {value!r}")


def _patch(
    model: nn.Module, r: int, targets: Any, dropout: float, config: Any, quantize: str | None
) -> LoraConfig | None:
    """Patches a model without data, and returns the config that was asked for."""
    if config is None:
        patch(model, r, targets, dropout=dropout, quantize=quantize, allow_output_head=True)
        return None
    wanted = config if isinstance(config, LoraConfig) else LoraConfig.from_peft(config)
    # The other ways to start an adapter read weights or data; they do not change what is planned here.
    init = wanted.init_lora_weights
    plain = wanted if init in PLAIN_INITS else replace(wanted, init_lora_weights=True)
    patch(model, config=plain, quantize=quantize, allow_output_head=True)
    return wanted


def _memory(model: nn.Module, batch: int, length: int, checkpointing: bool, optimizer: str) -> tuple[Memory, list[str]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapters = sum(parameter.nbytes for parameter in trained)
    tensors = itertools.chain(model.parameters(), model.buffers())
    weights = sum({id(tensor): tensor.nbytes for tensor in tensors}.values()) - adapters
    state = state_bytes(optimizer, trained)
    step: StepMemory | None = None
    problem = []
    try:
        step = step_memory(model, batch, length, checkpointing)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        # Whatever stops a model's own forward; the rest of the plan stands without it.
        problem = [f"activations were not counted: {type(error).__name__}: {str(error).splitlines()[0]}"]
    if step is None:
        return Memory(weights, adapters, adapters, state, None, None), problem
    return Memory(weights, adapters, adapters, state, step.kept, weights + 2 * adapters + state + step.peak), problem
