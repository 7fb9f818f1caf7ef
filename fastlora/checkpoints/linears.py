"""Which weights of a checkpoint are those of linear layers that an int8 format stores in int8.

The model's class says it, built without weights where transformers has the class; otherwise the tensors' names do.
Output heads, routers and layers that the model keeps in float32 stay dense.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..log import logger
from .int8 import Int8Format
from .names import HEADS, INPUTS, same_tensor
from .shards import DTYPES, Entry, Shard

EXPERT = re.compile(r"(.*\.)?experts\.\d+\.[^.]+")  # one projection of one expert, as checkpoints store them
EXPERTS = r"re:.*\.experts\..*"  # all of them, in the words of compressed-tensors
# Names of what is no linear layer, or a router or a head, where there is no class to ask.
NOT_LINEAR = re.compile(r"(?i).*(norm|embed|router|position|score|classif).*|gate|wte|wpe|ln_\w+")


@dataclass(frozen=True)
class Linears:
    """The split of a model's linear layers.

    Attributes:
        quantized: the names of weights to store in int8, and whether each is stored as `[K, N]`.
        dense: the names of modules that a loader would take for int8 layers, and that are not.
    """

    quantized: dict[str, bool]
    dense: list[str]


def find_linears(settings: dict[str, Any], shards: list[Shard], format: Int8Format) -> Linears:
    """The linear layers of a checkpoint that a format stores in int8, and those that it leaves.

    Args:
        settings: its config.json.
        shards: its files.

    Raises:
        ValueError: there are none.
    """
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    model = skeleton(settings)
    if format.patterns and not format.experts and _experts(entries):
        raise ValueError(
            f"base: expected a model without experts for {format.name}, found experts one by one, which transformers "
            "reads in pack-quantized alone"
        )
    found = _by_name(entries) if model is None else _by_class(model, entries, format.conv1d)
    experts = set(_experts(entries)) if format.experts else set()
    quantized = found.quantized | {f"{module}.weight": False for module in experts}
    if not quantized:
        raise ValueError(f"base: expected linear layers that {format.name} has, found none")
    dense = sorted(set(found.dense) - experts)
    if format.patterns and any(".experts." in name and name not in quantized for name in entries):
        dense.append(EXPERTS)
    return Linears(quantized, dense)


def skeleton(settings: dict[str, Any]) -> nn.Module | None:
    """The model without its weights, on the meta device; None where transformers has no class for it."""
    import transformers

    name = next(iter(settings.get("architectures") or []), "")
    kind: Any = getattr(transformers, name, None)
    model_type = str(settings.get("model_type"))
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or model_type not in transformers.CONFIG_MAPPING:
        logger.warning("transformers has no class %r: linear layers are found by the names of their weights", name)
        return None
    config = transformers.CONFIG_MAPPING[model_type].from_dict(settings)
    with torch.device("meta"):
        return kind(config)


def _by_class(model: nn.Module, entries: dict[str, Entry], conv1d: bool) -> Linears:
    from transformers.pytorch_utils import Conv1D

    quantized: dict[str, bool] = {}
    dense: list[str] = []
    left_out = _left_out(model)
    for name, module in model.named_modules():
        transposed = isinstance(module, Conv1D)
        shape = getattr(getattr(module, "weight", None), "shape", ())
        if len(shape) != 2 or isinstance(module, nn.Embedding) or (transposed and not conv1d):
            continue
        stored = same_tensor(f"{name}.weight", entries)
        linear = transposed or type(module) is nn.Linear
        if linear and name not in left_out and len(stored) == 1 and _is_matrix(entries[stored[0]]):
            quantized[stored[0]] = transposed
        else:
            dense.append(name)
    return Linears(quantized, dense)


def _left_out(model: Any) -> set[str]:
    """Linear layers that stay dense: the output head, the last layer of a classifier, those to keep in float32."""
    head, last = model.get_output_embeddings(), list(model.named_parameters())[-1][0].rpartition(".")[0]
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    return {
        name for name, module in model.named_modules()
        if (head is not None and module is head) or name == last
        or any(re.search(rf"(^|\.)(?:{pattern})(\.|$)", name) for pattern in kept)
    }  # fmt: skip


def _by_name(entries: dict[str, Entry]) -> Linears:
    quantized: dict[str, bool] = {}
    dense: list[str] = []
    for name, entry in entries.items():
        module, _, attribute = name.rpartition(".")
        if attribute != "weight" or not _is_matrix(entry):
            continue
        own = module.rpartition(".")[2]
        if own in HEADS | INPUTS or NOT_LINEAR.fullmatch(own):
            dense.append(module)
        else:
            quantized[name] = False
    return Linears(quantized, dense)


def _experts(entries: dict[str, Entry]) -> list[str]:
    """Modules of experts that are stored one by one, whose weights a loader may put together."""
    named = {name.removesuffix(".weight"): entry for name, entry in entries.items() if name.endswith(".weight")}
    return [name for name, entry in named.items() if EXPERT.fullmatch(name) and _is_matrix(entry)]


def _is_matrix(entry: Entry) -> bool:
    return len(entry.shape) == 2 and entry.dtype in DTYPES and min(entry.shape) > 0
