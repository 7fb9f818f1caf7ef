"""Rows as sequences of tokens with labels: -100, which no loss counts, where the model is only to read.

Of a conversation the assistant's messages are learnt, of a pair the completion, of a text all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Row
from .settings import Data

IGNORED = -100
USUAL_LENGTH = 1024

Sequence = dict[str, list[int]]  # input_ids and labels, of one length


def length_of(settings: Data, model_length: int | None) -> int:
    """Tokens in the longest sequence: those asked for, by default 1024 or as many as the model takes.

    Raises:
        ValueError: the model takes fewer.
    """
    if settings.max_length is None:
        return min(USUAL_LENGTH, model_length or USUAL_LENGTH)
    if model_length is not None and settings.max_length > model_length:
        raise ValueError(f"data.max_length: expected at most {model_length}, the model's, found {settings.max_length}")
    return settings.max_length


def make_sequences(rows: Iterable[Row], tokenizer: Any, settings: Data, length: int) -> list[Sequence]:
    """The rows' tokens, cut, dropped, refused or joined to what fits.

    Raises:
        ValueError: a row is longer than `length` and is to be refused, has nothing to learn, or is a conversation for
            a tokenizer without a chat template.
    """
    sequences, pieces = [], []
    for row in rows:
        sequence = _sequence(row, tokenizer)
        if settings.packing or row.continuous:
            pieces.append(sequence)
        elif (fitted := _fitted(row, sequence, settings.too_long, length)) is not None:
            sequences.append(fitted)
    sequences += _packed(pieces, length)
    learnt = [sequence for sequence in sequences if any(label != IGNORED for label in sequence["labels"][1:])]
    if not learnt:
        raise ValueError(f"{settings.train}: expected rows with something to learn within {length} tokens, found none")
    return learnt


def set_chat_template(tokenizer: Any, file: Path | None) -> None:
    """Gives the tokenizer the template in a Jinja file, if there is one."""
    if file is not None:
        tokenizer.chat_template = file.read_text(encoding="utf-8")


def _sequence(row: Row, tokenizer: Any) -> Sequence:
    if row.messages is not None:
        return _conversation(row, tokenizer)
    encode = lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # noqa: E731
    # Encoded apart, as it is when the model is asked later: together, a token might span the boundary.
    prompt, completion = encode(row.prompt) if row.prompt else [], encode(row.completion)
    start = [tokenizer.bos_token_id] if _begins_with_bos(tokenizer) else []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = start + prompt + completion + end
    ignored = len(start + prompt)
    return {"input_ids": ids, "labels": [IGNORED] * ignored + ids[ignored:]}


def _begins_with_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]


def _conversation(row: Row, tokenizer: Any) -> Sequence:
    """The whole conversation; what each message of the assistant adds to the one before it is learnt."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{row.place}: expected a tokenizer with a chat template for messages, found none; name a "
                         "file with data.chat_template")  # fmt: skip
    messages = row.messages or []
    ids = _render(tokenizer, messages, False)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], True)
        after = _render(tokenizer, messages[: index + 1], False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ValueError(
                f"{row.place}: expected a chat template that only adds to a conversation, found one that changes it "
                f"with message {index + 2 if ids[: len(before)] == before else index + 1}; keep the last answer alone"
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return {"input_ids": ids, "labels": labels}


def _render(tokenizer: Any, messages: list[dict[str, Any]], ask: bool) -> list[int]:
    if not messages:
        return []
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template has the special ones


def _fitted(row: Row, sequence: Sequence, too_long: str, length: int) -> Sequence | None:
    found = len(sequence["input_ids"])
    if found <= length:
        return sequence
    if too_long == "refuse":
        raise ValueError(
            f"{row.place}: expected at most {length} tokens, found {found}; set data.too_long to cut or drop, or raise "
            "data.max_length where the model takes more"
        )
    return {name: values[:length] for name, values in sequence.items()} if too_long == "cut" else None


def _packed(sequences: list[Sequence], length: int) -> list[Sequence]:
    """The sequences one behind the other in pieces of one length; the last is shorter.

    A token sees all before it in its piece, those of other rows too.
    """
    joined = {name: [value for sequence in sequences for value in sequence[name]] for name in ("input_ids", "labels")}
    count = len(joined["input_ids"])
    return [
        {name: values[start : start + length] for name, values in joined.items()} for start in range(0, count, length)
    ]


class Collator:
    """Batches of sequences `[B, T]`, padded on the right to the longest of them."""

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, sequences: list[Sequence]) -> dict[str, Tensor]:
        longest = max(len(sequence["input_ids"]) for sequence in sequences)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for sequence in sequences:
            count = len(sequence["input_ids"])
            rest = longest - count
            columns["input_ids"].append(sequence["input_ids"] + [self.padding] * rest)
            columns["labels"].append(sequence["labels"] + [IGNORED] * rest)
            columns["attention_mask"].append([1] * count + [0] * rest)
        return {name: torch.tensor(values) for name, values in columns.items()}
