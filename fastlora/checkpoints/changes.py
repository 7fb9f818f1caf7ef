"""What an adapter folder does to the tensors of a checkpoint, found from names and shapes alone.

W += scale * B A         linear layers; transposed where the weight is stored as [K, N] (Conv1D, embeddings)
W = m / ||W + s B A|| * (W + s B A)                                                  DoRA
bias += scale * bias of B                                                            lora_bias
tensor = the adapter's                                         modules_to_save, biases, embeddings
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .. import ops
from ..config import PREFIX, LoraConfig
from ..inits.choose import changes_weight
from ..layers import dora
from ..models.targets import rank_of, scaling_of
from .shards import DTYPES, Entry

BLOCK = 1 << 24  # elements of a tensor held at once
LEADING = ("model.", "transformer.")  # what names of a bare model's checkpoint lack, and those of one with a head have
INPUTS = {"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"}
HEADS = {"lm_head", "embed_out", "output_projection", "decoder"}
# Classes without an output head; GPT2LMHeadModel has one.
HEADLESS = re.compile(r".*((?<!Head)(?<!Heads)Model|Classification|QuestionAnswering)")
PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


@dataclass
class Change:
    """What happens to one tensor: it is replaced, then has a low-rank product or a bias added.

    Attributes:
        a, b: float32 `[R, K]` and `[N, R]`.
        transposed: whether the tensor is stored as `[K, N]`.
        magnitude: DoRA's, float32 `[N]`.
        added: what a bias has added, float32 `[N]`.
    """

    replacement: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    transposed: bool = False
    magnitude: Tensor | None = None
    added: Tensor | None = None

    @torch.no_grad()
    def blocks(
        self, entry: Entry, file: BinaryIO, device: Any, dtype: torch.dtype | None = None
    ) -> Iterator[Tensor]:  # fmt: skip
        """The changed tensor, rows after rows.

        Args:
            dtype: that of the result, by default the tensor's; nothing is rounded to a narrower one on the way.

        Raises:
            ValueError: a value is not finite.
        """
        # The norms of a transposed weight run over its rows, which then are needed at once.
        whole = self.magnitude is not None and self.transposed
        step = entry.rows if whole else max(1, BLOCK // max(1, entry.columns))
        for start in range(0, entry.rows, max(1, step)):
            rows = slice(start, start + step)
            w = entry.read(file, rows) if self.replacement is None else self.replacement[rows]
            merged = self._applied(w.to(device, dtype or DTYPES[entry.dtype]), rows)
            if not torch.isfinite(merged).all():
                raise ValueError(f"{entry.name}: expected finite merged weights, found inf or nan")
            yield merged

    def _applied(self, w: Tensor, rows: slice) -> Tensor:
        if self.added is not None:
            return (w + self.added[rows].to(w.device)).to(w.dtype)
        if self.a is None or self.b is None:
            return w
        a, b = self.a.to(w.device), self.b.to(w.device)
        if self.magnitude is not None:
            return self._with_magnitude(w, a, b, self.magnitude.to(w.device), rows)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return ops.merge_rows(w, None, right, left[rows], self.scale)[0]

    def _with_magnitude(self, w: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, rows: slice) -> Tensor:
        """DoRA, in the very steps that a layer takes, so that the results are the same."""
        if self.transposed:
            w = w.T
        else:
            b, magnitude = b[rows], magnitude[rows]
        factor = magnitude / dora.row_norm(dora.squared_rows(w, None), w, None, a, b, self.scale)
        scaled = w.float() * (1 + (factor - 1))[:, None]
        merged = ops.merge_rows(scaled, None, a, self.scale * b * factor[:, None], 1.0)[0].to(w.dtype)
        return merged.T if self.transposed else merged


def find_changes(
    config: LoraConfig, tensors: dict[str, Tensor], entries: dict[str, Entry], settings: dict[str, Any]
) -> dict[str, Change]:
    """The changes by tensor name. Every tensor of the adapter has its part in one.

    Args:
        config, tensors: the adapter.
        entries: the tensors of the checkpoint.
        settings: the values of its config.json.

    Raises:
        ValueError: something is not supported, or does not fit the checkpoint.
    """
    _check_supported(config, settings)
    parts: dict[str, dict[str, Tensor]] = {}
    changes: dict[str, Change] = {}
    for key, tensor in tensors.items():
        if "trainable_tokens" in key or ".token_adapter." in key:
            raise ValueError(f"trainable_token_indices: not supported in a merge on disk, found {key!r}")
        if not key.startswith(PREFIX):
            raise ValueError(f"adapter: expected names that begin with {PREFIX!r}, found {key!r}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"adapter: expected finite weights, found inf or nan in {key!r}")
        module, is_part, part = key.removeprefix(PREFIX).rpartition(".lora_")
        if is_part:
            parts.setdefault(module, {})[f"lora_{part}"] = tensor.float()
        else:
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
            _change(changes, entries, name, key, replacement=tensor)
            _check_shape(key, tensor.shape, entries[_resolve(name, entries, key)].shape)
    for module, found in parts.items():
        _add_parts(changes, entries, module, found, config)
    _check_layouts(config, changes, entries)
    _check_saved(config, changes)
    _check_ties(changes, entries, settings)
    return changes


def _change(changes: dict[str, Change], entries: dict[str, Entry], name: str, key: str, **values: Any) -> None:
    """Notes what happens to a tensor, where no other tensor of the adapter says the same of it."""
    resolved = _resolve(name, entries, key)
    if entries[resolved].dtype not in DTYPES:
        raise ValueError(f"base: expected {resolved} in one of {list(DTYPES)}, found {entries[resolved].dtype}")
    change = changes.setdefault(resolved, Change())
    for attribute, value in values.items():
        if attribute in ("a", "replacement") and getattr(change, attribute) is not None:
            raise ValueError(f"adapter: expected one change of {resolved}, found another with {key!r}")
        setattr(change, attribute, value)


def same_tensor(name: str, entries: Iterable[str]) -> list[str]:
    """What a tensor may be called in a checkpoint: names that have a leading part less or one more count too."""
    if name in entries:
        return [name]
    near = {lead + name for lead in LEADING} | {name.removeprefix(lead) for lead in LEADING}
    return sorted(near.intersection(entries))


def _resolve(name: str, entries: Iterable[str], key: str) -> str:
    """The checkpoint's name of a tensor, which may lack a leading part or have one more."""
    found = same_tensor(name, entries)
    if len(found) == 1:
        return found[0]
    module, _, attribute = name.rpartition(".")
    hint = f"one of {found}, which is ambiguous" if found else "none"
    if not found and module.rpartition(".")[2] in HEADS | INPUTS:
        hint += "; it is tied to another tensor, which an adapter would then change too: untie the base first"
    if not found and attribute == "bias":
        hint += ", so there is no place for a trained bias"
    raise ValueError(f"{key}: expected a tensor {name!r} in the base, found {hint}")


def _add_parts(
    changes: dict[str, Change], entries: dict[str, Entry], module: str, found: dict[str, Tensor], config: LoraConfig
) -> None:
    """Notes the low-rank product and the bias of one module."""
    key = f"{PREFIX}{module}"
    first = next((part for part in PAIRS if part in found), "lora_A.weight")
    wanted = {first, PAIRS[first]}
    wanted |= {"lora_magnitude_vector"} if config.use_dora else set()
    wanted |= {"lora_B.bias"} if config.lora_bias else set()
    if found.keys() != wanted:
        raise ValueError(f"{key}: expected {sorted(wanted)}, found {sorted(found)}")
    a, b = found[first], found[PAIRS[first]]
    entry = entries[_resolve(f"{module}.weight", entries, f"{key}.{first}")]
    rank = rank_of(config, module)
    if a.dim() != 2 or b.dim() != 2 or len(entry.shape) != 2:
        raise ValueError(
            f"{key}: expected matrices, found shapes {list(a.shape)}, {list(b.shape)}, {list(entry.shape)}"
        )
    N, K = b.shape[0], a.shape[1]
    _check_shape(f"{key}.{first}", a.shape, (rank, K))
    _check_shape(f"{key}.{PAIRS[first]}", b.shape, (N, rank))
    embedding = first == "lora_embedding_A"
    if entry.shape not in ({(K, N)} if embedding else {(N, K), (K, N)}):
        raise ValueError(f"{key}: expected {entry.name} of shape {[N, K]}, found {list(entry.shape)}")
    transposed = embedding or (config.fan_in_fan_out if N == K else entry.shape == (K, N))
    magnitude = found["lora_magnitude_vector"].flatten() if config.use_dora else None
    if magnitude is not None:
        _check_shape(f"{key}.lora_magnitude_vector", magnitude.shape, (N,))
    scale = scaling_of(config, module)
    _change(changes, entries, f"{module}.weight", f"{key}.{first}", a=a, b=b, scale=scale, transposed=transposed,
            magnitude=magnitude)  # fmt: skip
    if config.lora_bias:
        bias_key = f"{key}.lora_B.bias"
        _change(changes, entries, f"{module}.bias", bias_key, added=scale * found["lora_B.bias"])
        _check_shape(bias_key, found["lora_B.bias"].shape, entries[_resolve(f"{module}.bias", entries, key)].shape)


def _check_supported(config: LoraConfig, settings: dict[str, Any]) -> None:
    for name in ("target_parameters", "trainable_token_indices"):
        if getattr(config, name):
            raise ValueError(f"{name}: not supported in a merge on disk, found {getattr(config, name)!r}")
    if changes_weight(config.init_lora_weights):
        raise ValueError(
            f"init_lora_weights: expected an adapter for the base as it is, found {config.init_lora_weights!r}, which "
            "changes the base first; load it into the model and save it again"
        )
    if settings.get("quantization_config"):
        raise ValueError("base: expected weights that are not quantised, found a quantization_config in config.json")


def _check_shape(name: str, found: Iterable[int], expected: Iterable[int]) -> None:
    if tuple(found) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)}, found {list(found)}")


def _check_layouts(config: LoraConfig, changes: dict[str, Change], entries: dict[str, Entry]) -> None:
    """Refuses a square weight where the layouts of the others contradict what the adapter's config says of it."""
    linear = {name: change for name, change in changes.items() if change.a is not None and not is_input(name)}
    square = [name for name in linear if len(set(entries[name].shape)) == 1]
    others = [name for name in linear if name not in square and linear[name].transposed != config.fan_in_fan_out]
    if square and others:
        raise ValueError(
            f"fan_in_fan_out: expected {not config.fan_in_fan_out} as for {others[0]}, found {config.fan_in_fan_out}, "
            f"so the layout of the square {square[0]} is not known"
        )


def _check_saved(config: LoraConfig, changes: dict[str, Change]) -> None:
    replaced = [f".{name}" for name, change in changes.items() if change.replacement is not None]
    for module in config.modules_to_save or []:
        if not any(f".{module}." in name for name in replaced):
            raise ValueError(f"modules_to_save: expected tensors of {module!r} in the adapter, found none")


def is_input(name: str) -> bool:
    """Whether a tensor belongs to an input embedding."""
    return name.split(".")[-2:-1] != [] and name.split(".")[-2] in INPUTS


def is_head(name: str) -> bool:
    """Whether a tensor is the weight of an output head."""
    return name.endswith(".weight") and name.split(".")[-2] in HEADS


def _check_ties(changes: dict[str, Change], entries: dict[str, Entry], settings: dict[str, Any]) -> None:
    """Refuses to change an embedding or an output head that the model makes one tensor when it loads."""
    text: dict[str, Any] = settings.get("text_config") or {}
    tied = settings.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    classes = [str(name) for name in settings.get("architectures") or []]
    if tied is None:
        headless = any(HEADLESS.fullmatch(name) for name in classes)
        tied = not headless and not any(is_head(name) for name in entries)
    for name in changes:
        if f".{name}".endswith(".shared.weight") or (tied and (is_input(name) or is_head(name))):
            raise ValueError(
                f"{name}: expected a tensor that is tied to no other, found one that the model's input embedding and "
                "output head share; untie the base first (tie_word_embeddings false, and both tensors in its files)"
            )
