"""What a plan warns about: what will not train, what will not be fast, and what was not counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .. import ops
from ..config import LoraConfig
from ..layers import LoraLayer, LoraParameter, is_linear4bit
from ..models.targets import output_head
from ..ops.dispatch import GPU_MAX_RANK
from .rows import Row
from .sources import Source

LARGE_SHARE = 0.5  # of the model's weights, from which on it is worth a word that nothing trains there
BASE_KEPT = ("pissa", "olora", "corda", "lora_ga", "loftq")


def find_notes(
    source: Source, rows: list[Row], config: LoraConfig | None, device: torch.device, dtype: torch.dtype, length: int
) -> list[str]:
    """Sentences, the most important first."""
    model = source.model
    return [
        *_what_will_not_train(model, rows),
        *_what_will_not_be_fast(model, rows, device, dtype),
        *_what_was_not_counted(source, config),
        *_what_does_not_fit(model, length),
    ]


def _what_will_not_train(model: nn.Module, rows: list[Row]) -> Iterator[str]:
    head = output_head(model)
    if head is not None and _has_adapter(model.get_submodule(head)):
        yield (
            f"{head}: an adapter on the output head does not train under trainers that compute the loss from its "
            "weight, such as SFTTrainer; patch takes it with allow_output_head=True only"
        )
    total = sum(row.parameters for row in rows)
    for row in rows:
        if len(row.shape) == 3 and not row.trainable and row.parameters > LARGE_SHARE * total and row.rank == 0:
            adapted = [other for other in rows if other.rank and other.name.startswith(f"{row.name}.")]
            if not adapted:
                yield (
                    f"{row.name}: {row.parameters / total:.0%} of the weights are fused experts without an adapter; "
                    "target_parameters reaches them"
                )


def _has_adapter(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and bool(module.lora_A)


def _what_will_not_be_fast(
    model: nn.Module, rows: list[Row], device: torch.device, dtype: torch.dtype
) -> Iterator[str]:
    if ops.is_slow(device, dtype):
        yield (
            f"this CPU has no kernels for {dtype}: fastlora's layers compute in float32, everything else is slow in "
            "it; load the model with dtype=torch.float32"
        )
    for row in rows:
        if row.rank and "PyTorch" in row.computed_by:
            yield f"{row.name}: {row.computed_by}"
        if row.rank > GPU_MAX_RANK and device.type != "cuda":
            yield f"{row.name}: rank {row.rank} runs in eager PyTorch on a GPU, whose kernels hold {GPU_MAX_RANK}"
        if len(row.shape) == 2 and row.rank > min(row.shape):
            yield f"{row.name}: rank {row.rank} is more than a weight of shape {list(row.shape)} has"


def _what_was_not_counted(source: Source, config: LoraConfig | None) -> Iterator[str]:
    if source.quantized_by:
        yield f"weights are counted dense, though the files are quantised by {source.quantized_by}"
    if any(is_linear4bit(module) for module in source.model.modules()):
        yield "the scales of 4-bit weights are not counted"
    method = config.init_lora_weights if config is not None else True
    if isinstance(method, str) and method.startswith(BASE_KEPT):
        kept = sum(layer.weight.nbytes for layer in source.model.modules() if _is_weighted(layer))
        yield f"init_lora_weights={method!r} keeps the targets' original weights besides, {kept / 2**20:,.1f} MiB"


def _is_weighted(layer: Any) -> bool:
    return isinstance(layer, LoraLayer) and not isinstance(layer, LoraParameter) and bool(layer.lora_A)


def _what_does_not_fit(model: Any, length: int) -> Iterator[str]:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < length:
        yield f"length {length} is past the {longest} tokens that the model was made for"


def memory_note(peak: int, device: torch.device) -> list[str]:
    """Whether a step is more than this machine holds; nothing where the device is not here."""
    if device.type == "cuda" and torch.cuda.is_available():
        holds = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and "SC_PHYS_PAGES" in os.sysconf_names:
        holds = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return []
    if peak <= holds:
        return []
    return [
        f"a step takes {peak / 2**30:,.1f} GiB at its peak, and this machine's {device.type} has {holds / 2**30:,.1f}"
    ]
