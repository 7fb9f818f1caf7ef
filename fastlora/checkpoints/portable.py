"""An adapter as other tools read it.

"peft" is the adapter itself, checked against the base. "portable" is for readers of less of PEFT's format: vLLM, which
ignores patterns of ranks and alphas, and llama.cpp, which takes `lora_alpha / rank` for the scale of every module:

    B A * scale  =  (scale B, 0) (A, 0)^T * alpha / rank      with alpha = rank, the same for all modules
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..adapters.files import WEIGHTS_FILE, read_tensors, write_folder
from ..config import PREFIX, LoraConfig
from ..init_settings import SETTINGS
from ..models.targets import rank_of, scaling_of, shortest_targets
from .changes import Adapter, find_all_changes
from .folder import filling, fingerprint, small_files, write_file
from .inputs import read_settings
from .names import is_head, is_input, same_tensor
from .report import ExportReport
from .shards import DTYPES, Entry, find_shards

A, B = ".lora_A.weight", ".lora_B.weight"
# Projections that some versions of a model have as one, its rows one after the other.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "W_pack": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# What a low-rank product alone cannot say.
NOT_PORTABLE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
                "layer_replication")  # fmt: skip
TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "spiece")

Pairs = dict[str, tuple[Tensor, Tensor]]


def export_adapter(base: Path, adapter: Path, out: Path, portable: bool) -> ExportReport:
    """Writes an adapter that is checked against a base, as PEFT has it or as more tools read it.

    Raises:
        ValueError: the adapter does not fit the base, or cannot be said in the portable format.
    """
    shards = find_shards(base)
    entries = {entry.name: entry for shard in shards for entry in shard.entries}
    config, tensors = LoraConfig.from_folder(adapter), read_tensors(adapter)
    notes: list[str] = []
    if portable:
        config, tensors = portable_adapter(config, tensors, entries, notes)
    else:
        tensors = _without_copies(config, tensors, entries, notes)
    if not find_all_changes([Adapter(config, tensors)], entries, read_settings(base))[0]:
        raise ValueError(f"{adapter}: expected LoRA weights, found an empty file")
    config = _without_training(config)
    name = "portable" if portable else "peft"
    beside = [file for file in small_files(adapter) if file.name.startswith(TOKENIZER)]
    with filling(out, fingerprint(shards, beside, adapter, to=name), [WEIGHTS_FILE]):
        for file in beside:
            write_file(out / file.name, file.read_bytes())
        write_folder(out, {key: tensor.contiguous() for key, tensor in tensors.items()}, config)
    return ExportReport(name, (out / WEIGHTS_FILE).stat().st_size, notes=tuple(notes))


def _without_training(config: LoraConfig) -> LoraConfig:
    """The config without how the adapter began, which says nothing of what it is now."""
    plain = LoraConfig()
    return replace(config, init_lora_weights=True, **{name: getattr(plain, name) for name, _ in SETTINGS.values()})


def _without_copies(
    config: LoraConfig, tensors: dict[str, Tensor], entries: dict[str, Entry], notes: list[str]
) -> dict[str, Tensor]:
    """The tensors without embeddings and heads that are the base's own, which PEFT adds where it cannot tell."""
    copies = []
    for key, tensor in tensors.items():
        stored = same_tensor(key.removeprefix(PREFIX).replace(".base_layer.", "."), entries)
        entry = entries[stored[0]] if len(stored) == 1 else None
        saved = any(f".{module}." in key for module in config.modules_to_save or [])
        if entry is None or saved or not (is_input(entry.name) or is_head(entry.name)):
            continue
        if entry.dtype not in DTYPES or entry.shape != tuple(tensor.shape):
            continue
        with entry.path.open("rb") as file:
            if torch.equal(entry.read(file, slice(0, entry.rows)), tensor.to(DTYPES[entry.dtype])):
                copies.append(key)
    if copies:
        notes.append(f"left out what is the base's own: {', '.join(copies)}")
    return {key: tensor for key, tensor in tensors.items() if key not in copies}


def portable_adapter(
    config: LoraConfig, tensors: dict[str, Tensor], entries: dict[str, Entry], notes: list[str]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The same update of every weight with one rank, scales of 1 and no fused projections that the base has apart.

    Args:
        config, tensors: the adapter.
        entries: the tensors of the base.
        notes: gets what was changed.

    Raises:
        ValueError: the adapter has more than low-rank products of linear layers.
    """
    for name in NOT_PORTABLE:
        if getattr(config, name):
            raise ValueError(f"{name}: not expressible in a portable adapter, found {getattr(config, name)!r}; "
                             "export a merged model instead")  # fmt: skip
    pairs = _apart(_pairs(tensors), entries, notes)
    found = {module: rank_of(config, _fused_name(module, tensors)) for module in pairs}
    scales = {module: scaling_of(config, _fused_name(module, tensors)) for module in pairs}
    rank = max(found.values())
    # A product by a power of two is exact; others keep float32's digits.
    exact = all(math.frexp(scale)[0] == 0.5 for scale in scales.values())
    written: dict[str, Tensor] = {}
    for module, (a, b) in pairs.items():
        grown = rank - a.shape[0]
        b = (b.double() * scales[module]).to(b.dtype if exact else torch.float32)
        written[PREFIX + module + A] = F.pad(a if exact else a.float(), (0, 0, 0, grown))
        written[PREFIX + module + B] = F.pad(b, (0, grown))
    if len(set(found.values())) > 1:
        notes.append(f"ranks {sorted(set(found.values()))} became {rank}, with rows of zeros")
    if set(scales.values()) != {1.0}:
        notes.append(f"scales {sorted(set(scales.values()))} are in B now")
    modules = [name.removesuffix(".weight") for name in entries if name.endswith(".weight")]
    targets = shortest_targets(list(pairs), modules)
    config = replace(
        config, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={}, alpha_pattern={}, target_modules=targets,
        exclude_modules=None, layers_to_transform=None, layers_pattern=None, bias="none", init_lora_weights=True,
    )  # fmt: skip
    return config, written


def _pairs(tensors: dict[str, Tensor]) -> Pairs:
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part = next((part for part in (A, B) if key.endswith(part)), None)
        if part is None or not key.startswith(PREFIX) or tensor.dim() != 2:
            raise ValueError(
                f"adapter: expected matrices lora_A and lora_B of linear layers for a portable adapter, found {key!r} "
                f"of shape {list(tensor.shape)}; export a merged model instead"
            )
        pairs.setdefault(key.removeprefix(PREFIX).removesuffix(part), {})[part] = tensor
    for module, found in pairs.items():
        if found.keys() != {A, B}:
            raise ValueError(f"{PREFIX}{module}: expected {A} and {B}, found {sorted(found)}")
    return {module: (found[A], found[B]) for module, found in pairs.items()}


def _apart(pairs: Pairs, entries: dict[str, Entry], notes: list[str]) -> Pairs:
    """Products on fused projections that the base has apart, one for each: they share A, and B's rows are theirs."""
    apart: Pairs = {}
    for module, (a, b) in pairs.items():
        parent, _, name = module.rpartition(".")
        parts = [f"{parent}.{part}" for part in FUSED.get(name, ())]
        stored = [found[0] for part in parts if (found := same_tensor(f"{part}.weight", entries))]
        if same_tensor(f"{module}.weight", entries) or not parts or len(stored) < len(parts):
            apart[module] = a, b
            continue
        if both := [part for part in parts if part in pairs or part in apart]:
            raise ValueError(f"adapter: expected one product for {both[0]!r}, found another in {module!r}")
        rows = [entries[part].shape[0] for part in stored]
        if sum(rows) != b.shape[0]:
            raise ValueError(f"{PREFIX}{module}{B}: expected {sum(rows)} rows for {FUSED[name]}, found {b.shape[0]}")
        apart |= {part: (a.clone(), rows_of.clone()) for part, rows_of in zip(parts, b.split(rows), strict=True)}
        if (note := f"{name} became {', '.join(FUSED[name])}") not in notes:
            notes.append(note)
    return apart


def _fused_name(module: str, tensors: dict[str, Tensor]) -> str:
    """What the module, or the fused one that it was part of, is called in the adapter."""
    if PREFIX + module + A in tensors:
        return module
    parent, _, name = module.rpartition(".")
    fused = (f"{parent}.{whole}" for whole, parts in FUSED.items() if name in parts)
    return next(whole for whole in fused if PREFIX + whole + A in tensors)
