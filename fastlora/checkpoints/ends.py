"""The input embedding and the output head of a checkpoint that makes them one tensor when it is loaded.

An adapter on one of them makes two tensors of them, as merging in memory does: the other keeps what it had, and
`tie_word_embeddings` becomes false. What changes the shared tensor itself leaves them tied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .change import Change
from .names import is_head, is_input
from .shards import Entry

# Classes without an output head; GPT2LMHeadModel has one.
HEADLESS = re.compile(r".*((?<!Head)(?<!Heads)Model|Classification|QuestionAnswering)")
# Classes whose head, where the files lack it, has the name that `_head_name` says.
GENERATING = re.compile(r".*(ForCausalLM|LMHeadModel|ForConditionalGeneration)")
TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Ends:
    """Two tensors that are one. `head` is None where the checkpoint does not tell what the other would be called."""

    embedding: str
    head: str | None


def find_ends(entries: Mapping[str, Entry], settings: dict[str, Any]) -> Ends | None:
    """The tied ends of a checkpoint, None where they are not tied.

    Args:
        entries: its tensors.
        settings: the values of its config.json.
    """
    if not _are_tied(entries, settings):
        return None
    inputs = [name for name in entries if is_input(name) and name.endswith(".weight")]
    heads = [name for name in entries if is_head(name)]
    if len(inputs) != 1 or f".{inputs[0]}".endswith(".shared.weight") or len(heads) > 1:
        return Ends(next(iter(inputs + heads), ""), None)
    return Ends(inputs[0], heads[0] if heads else _head_name(inputs[0], settings))


def _are_tied(entries: Mapping[str, Entry], settings: dict[str, Any]) -> bool:
    text: dict[str, Any] = settings.get("text_config") or {}
    tied = settings.get(TIE, text.get(TIE))
    if tied is not None:
        return bool(tied)
    headless = any(HEADLESS.fullmatch(name) for name in _classes(settings))
    return not headless and not any(is_head(name) for name in entries)


def _classes(settings: dict[str, Any]) -> list[str]:
    return [str(name) for name in settings.get("architectures") or []]


def _head_name(embedding: str, settings: dict[str, Any]) -> str | None:
    """What the head is called in models of the usual build; the files of a bare model have no place for one."""
    path = embedding.split(".")
    if not any(GENERATING.fullmatch(name) for name in _classes(settings)) or len(path) < 3:
        return None
    if path[0] == "language_model":  # a whole model in another
        return None
    return "embed_out.weight" if path[-2] == "embed_in" else "lm_head.weight"


def with_head(entries: dict[str, Entry], ends: Ends | None) -> dict[str, Entry]:
    """The tensors, with a head that the files lack, which begins as the embedding."""
    if ends is None or ends.head is None or ends.head in entries:
        return entries
    return entries | {ends.head: replace(entries[ends.embedding], name=ends.head)}


def settle(changes: dict[str, Change], ends: Ends) -> bool:
    """Gives tied ends what each of them needs, and returns whether they are two tensors from now on.

    Args:
        changes: by tensor; gets those of the other end.

    Raises:
        ValueError: they would have to be, and the checkpoint does not tell how.
    """
    here = [name for name in changes if is_input(name) or is_head(name)]
    if not here:
        return False
    if ends.head is None or not set(here) <= {ends.embedding, ends.head}:
        raise _refused(here[0])
    embedding, head = (changes.setdefault(name, Change()) for name in (ends.embedding, ends.head))
    _share(embedding, head)
    return not _same(embedding, head)


def _share(embedding: Change, head: Change) -> None:
    """What changes the tensor that they share reaches both."""
    for one, other in ((embedding, head), (head, embedding)):
        if one.tokens is not None and other.tokens is None:
            other.tokens, other.token_rows = one.tokens, one.token_rows
        if one.replacement is not None and one.replaces_base and other.replacement is None:
            other.replacement, other.replaces_base = one.replacement, True


def _same(one: Change, other: Change) -> bool:
    if one.terms or other.terms or one.added or other.added:
        return False
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("replacement", "tokens", "token_rows")]
    return all(_equal(first, second) for first, second in pairs)


def _equal(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _refused(name: str) -> ValueError:
    return ValueError(
        f"{name}: expected a tensor that is tied to no other, found one that the model's input embedding and "
        f"output head share; untie the base first ({TIE} false, and both tensors in its files)"
    )


def untied_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The values of config.json for ends that are two tensors."""
    text: dict[str, Any] | None = settings.get("text_config")
    nested = {"text_config": text | {TIE: False}} if text is not None and TIE in text else {}
    return settings | nested | {TIE: False}
