"""What adapter folders do to the tensors of a checkpoint, found from names and shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters.trained import is_saved
from ..config import PREFIX, LoraConfig
from ..inits.choose import changes_weight
from ..layers.tokens import ROWS
from ..models.targets import rank_of, scaling_of
from .change import AbsmaxChange, Change, Term
from .ends import find_ends, settle, with_head
from .experts import find_parameters, split_path, terms_of
from .names import is_input, resolve
from .shards import DTYPES, Entry

PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
BASE_LAYERS = (".token_adapter.base_layer", ".base_layer")  # what wrappers add to the path of what they wrap
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Adapter:
    """The settings and tensors of an adapter folder, and the factor of its low-rank part."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    weight: float = 1.0


def find_all_changes(
    adapters: Sequence[Adapter], entries: dict[str, Entry], settings: dict[str, Any]
) -> tuple[dict[str, Change], bool]:
    """The changes of adapters together by tensor name, and whether tied embeddings become two tensors.

    Then one of the names may be new: an output head, which begins as the input embedding.

    Every tensor of an adapter has its part in a change.

    Args:
        entries: the tensors of the checkpoint.
        settings: the values of its config.json.

    Raises:
        ValueError: something is not supported, or does not fit the checkpoint, or two adapters exclude each other.
    """
    _check_base(settings)
    ends = find_ends(entries, settings)
    finder = _Finder(with_head(entries, ends))
    for adapter in adapters:
        finder.add(adapter)
    changes = finder.changes
    untied = ends is not None and settle(changes, ends)
    for name, change in changes.items():
        if change.tokens is not None and change.terms:
            raise ValueError(f"adapter: expected one change of {name}, found LoRA and trained tokens")
    return {name: change for name, change in changes.items() if untied or name in entries}, untied


class _Finder:
    """Collects the changes of adapters by tensor name.

    Attributes:
        entries: the tensors of the checkpoint.
    """

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries
        self.changes: dict[str, Change] = {}

    def add(self, adapter: Adapter) -> None:
        config, parts, replaced = adapter.config, dict[str, Parts](), list[str]()
        _check_supported(config)
        for key, tensor in adapter.tensors.items():
            if not key.startswith(PREFIX):
                raise ValueError(f"adapter: expected names that begin with {PREFIX!r}, found {key!r}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"adapter: expected finite weights, found inf or nan in {key!r}")
            name = key.removeprefix(PREFIX)
            module, is_part, part = name.rpartition(".lora_")
            if is_part:
                parts.setdefault(module, {})[f"lora_{part}"] = tensor
            elif name.endswith(f".{ROWS}"):
                self._add_tokens(name.removesuffix(f".{ROWS}"), key, tensor, config)
            else:
                replaced.append(self._replace(name, key, tensor, adapter))
        matrices = self._add_experts(parts, adapter)
        for module, found in matrices.items():
            self._add_parts(module, found, adapter)
        _check_layouts(config, self.changes, self.entries)
        _check_whole(config, replaced, adapter.tensors, experts=len(matrices) < len(parts))

    def _change(self, name: str, key: str, codes: bool = False) -> tuple[Entry, Change]:
        """A tensor, and what happens to it so far; `codes` says whether it may be int8."""
        entry = self.entries[resolve(name, self.entries, key)]
        if entry.name not in self.changes:
            change = self.changes[entry.name] = Change()
            if codes and entry.dtype == "I8":
                self._take_int8(entry, change)
        if entry.dtype not in DTYPES and self.changes[entry.name].absmax is None:
            raise ValueError(f"base: expected {entry.name} in one of {list(DTYPES)}, found {entry.dtype}")
        return entry, self.changes[entry.name]

    def _take_int8(self, entry: Entry, change: Change) -> None:
        """Finds what belongs to an int8 weight of bitsandbytes."""
        stem = entry.name.removesuffix("weight")
        absmax, layout = self.entries.get(f"{stem}SCB"), self.entries.get(f"{stem}weight_format")
        if absmax is None or absmax.dtype not in DTYPES or math.prod(absmax.shape) != entry.rows:
            raise ValueError(f"base: expected {stem}SCB with a value per row of {entry.name}, found {absmax}")
        if layout is not None:
            with layout.path.open("rb") as file:
                if (found := layout.read(file, slice(0, 1)).flatten().tolist()) != [0]:
                    raise ValueError(f"base: expected {layout.name} 0, rows one after the other, found {found}")
        change.absmax, change.new_absmax = absmax, torch.full((entry.rows,), math.nan)
        self.changes[absmax.name] = AbsmaxChange(weight=entry, weight_change=change)

    def _replace(self, name: str, key: str, tensor: Tensor, adapter: Adapter) -> str:
        """Notes a tensor of the adapter that stands for one of the base, and returns its name."""
        for infix in BASE_LAYERS:
            name = name.replace(f"{infix}.", ".")
        entry, change = self._change(name, key)
        _check_shape(key, tensor.shape, entry.shape)
        from_base = not is_saved(adapter.config, name.rpartition(".")[0]) and not name.endswith("bias")
        if adapter.weight != 1 and not from_base:
            raise ValueError(
                f"weight: expected 1 for an adapter that replaces {entry.name}, which it trained as a whole, "
                f"found {adapter.weight}"
            )
        tensor = tensor.to(DTYPES[entry.dtype])
        if change.replacement is not None and not torch.equal(change.replacement, tensor):
            raise ValueError(f"adapter: expected one change of {entry.name}, found another with {key!r}")
        change.replacement, change.replaces_base = tensor, from_base
        return entry.name

    def _add_tokens(self, module: str, key: str, rows: Tensor, config: LoraConfig) -> None:
        entry, change = self._change(f"{module}.weight", key)
        indices = config.trainable_token_indices
        if isinstance(indices, dict):
            named = [ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")]
            # A head that is tied to the embedding may be in the file as well.
            indices = next(iter(named or indices.values()))
        _check_shape(key, rows.shape, (len(indices or []), *entry.shape[1:]))
        tokens = torch.tensor(indices)
        if not ((tokens >= 0) & (tokens < entry.rows)).all():
            raise ValueError(f"trainable_token_indices: expected tokens from 0 to {entry.rows - 1}, found {indices}")
        if change.tokens is None or change.token_rows is None:
            change.tokens, change.token_rows = tokens, rows.to(DTYPES[entry.dtype])
            return
        if (both := set(tokens.tolist()) & set(change.tokens.tolist())):  # fmt: skip
            raise ValueError(f"adapter: expected different trained tokens, found {sorted(both)} in two of {entry.name}")
        change.tokens = torch.cat([change.tokens, tokens])
        change.token_rows = torch.cat([change.token_rows, rows.to(change.token_rows.dtype)])

    def _add_experts(self, parts: dict[str, Parts], adapter: Adapter) -> dict[str, Parts]:
        """Notes the products that belong to parameters, and returns the parts of modules."""
        modules, left = dict[str, dict[int, tuple[Tensor, Tensor]]](), dict[str, Parts]()
        for path, found in parts.items():
            module, depth = split_path(path)
            if not find_parameters(module, adapter.config, self.entries):
                left[path] = found
                continue
            _check_parts(f"{PREFIX}{path}", found, {"lora_A.weight", "lora_B.weight"})
            modules.setdefault(module, {})[depth] = found["lora_A.weight"], found["lora_B.weight"]
        for module, pairs in modules.items():
            for name, term in terms_of(module, pairs, adapter.config, self.entries, adapter.weight):
                self._change(name, module)[1].terms.append(term)
        return left

    def _add_parts(self, module: str, found: Parts, adapter: Adapter) -> None:
        """Notes the low-rank product and the bias of one module."""
        key, config = f"{PREFIX}{module}", adapter.config
        first = next((part for part in PAIRS if part in found), "lora_A.weight")
        wanted = {first, PAIRS[first]}
        wanted |= {"lora_magnitude_vector"} if config.use_dora else set()
        wanted |= {"lora_B.bias"} if config.lora_bias else set()
        _check_parts(key, found, wanted)
        entry, change = self._change(f"{module}.weight", f"{key}.{first}", codes=True)
        a, b = _matrices(key, found[first], found[PAIRS[first]], entry)
        rank, N, K = rank_of(config, module), b.shape[0], a.shape[1]
        _check_shape(f"{key}.{first}", a.shape, (rank, K))
        _check_shape(f"{key}.{PAIRS[first]}", b.shape, (N, rank))
        embedding, shape = first == "lora_embedding_A", (entry.rows, entry.columns)
        if shape not in ({(K, N)} if embedding else {(N, K), (K, N)}):
            raise ValueError(f"{key}: expected {entry.name} of shape {[N, K]}, found {list(entry.shape)}")
        change.transposed = embedding or (config.fan_in_fan_out if N == K else shape == (K, N))
        if change.transposed and change.absmax is not None:
            raise ValueError(f"base: expected {entry.name} as [out, in] in int8, found {list(entry.shape)}")
        magnitude = found["lora_magnitude_vector"].flatten() if config.use_dora else None
        if magnitude is not None:
            _check_shape(f"{key}.lora_magnitude_vector", magnitude.shape, (N,))
        scale = adapter.weight * scaling_of(config, module)
        change.terms.append(Term(a, b, scale, magnitude))
        if config.lora_bias:
            self._add_bias(module, found["lora_B.bias"], scale, f"{key}.lora_B.bias")

    def _add_bias(self, module: str, bias: Tensor, scale: float, key: str) -> None:
        entry, change = self._change(f"{module}.bias", key)
        _check_shape(key, bias.shape, entry.shape)
        change.added.append(scale * bias.float())


def _matrices(key: str, a: Tensor, b: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
    """A and B as matrices; those of a convolution have the axes of its kernel."""
    if a.dim() == b.dim() == len(entry.shape) > 2:
        # With groups, what the adapter adds is no grouped convolution.
        _check_shape(f"{key}.lora_A.weight", a.shape[1:], entry.shape[1:])
        a, b = a.flatten(1), b.flatten(1)
    elif a.dim() != 2 or b.dim() != 2 or len(entry.shape) != 2:
        raise ValueError(
            f"{key}: expected matrices, found shapes {list(a.shape)}, {list(b.shape)}, {list(entry.shape)}"
        )
    return a, b


def _check_parts(key: str, found: Parts, wanted: set[str]) -> None:
    if found.keys() != wanted:
        raise ValueError(f"{key}: expected {sorted(wanted)}, found {sorted(found)}")


def _check_supported(config: LoraConfig) -> None:
    if config.layer_replication:
        raise ValueError(f"layer_replication: not supported in a merge on disk, found {config.layer_replication!r}")
    if changes_weight(config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights: expected an adapter for the base as it is, found {config.init_lora_weights!r}, which "
            "changes the base first; load it into the model and save it again"
        )


def _check_base(settings: dict[str, Any]) -> None:
    quantization = settings.get("quantization_config")
    if quantization and not (isinstance(quantization, Mapping) and quantization.get("load_in_8bit")):
        raise ValueError(
            "base: expected weights that are not quantised, or in bitsandbytes 8-bit, found quantization_config "
            f"{quantization!r} in config.json"
        )


def _check_shape(name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, found {list(found)}")


def _check_layouts(config: LoraConfig, changes: dict[str, Change], entries: dict[str, Entry]) -> None:
    """Refuses a square weight where the layouts of the others contradict what the adapter's config says of it."""
    linear = {name: change for name, change in changes.items() if change.terms and not is_input(name)}
    linear = {name: change for name, change in linear.items() if len(entries[name].shape) == 2}
    square = [name for name in linear if len(set(entries[name].shape)) == 1]
    others = [name for name in linear if name not in square and linear[name].transposed != config.fan_in_fan_out]
    if square and others:
        raise ValueError(
            f"fan_in_fan_out: expected {not config.fan_in_fan_out} as for {others[0]}, found {config.fan_in_fan_out}, "
            f"so the layout of the square {square[0]} is not known"
        )


def _check_whole(config: LoraConfig, replaced: list[str], keys: Iterable[str], experts: bool) -> None:
    """Refuses an adapter that lacks what its config says it has."""
    if config.trainable_token_indices and not any(key.endswith(f".{ROWS}") for key in keys):
        raise ValueError(f"trainable_token_indices: expected their rows in the adapter, found none of {ROWS}")
    if config.target_parameters and not experts:
        raise ValueError(
            f"target_parameters: expected an adapter on parameters of the base, found none for "
            f"{config.target_parameters}"
        )
    for module in config.modules_to_save or []:
        if not any(f".{module}." in f".{name}" for name in replaced):
            raise ValueError(f"modules_to_save: expected tensors of {module!r} in the adapter, found none")
