"""Text for the quickstart: where it comes from, its blocks of tokens, and the loss on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SEQUENCE = 256
HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Blocks:
    """Token blocks `[*, SEQUENCE]` to train on and to hold out, and the bytes of text behind one token."""

    train: Tensor
    held_out: Tensor
    bytes_per_token: float


def read_text(file: Path | None) -> str:
    """A file's text, or the documentation of Python's language topics that comes with Python."""
    if file is not None:
        return file.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def blocks_of(text: str, tokenizer: Any) -> Blocks:
    """Splits a text into blocks of tokens; every tenth is held out.

    Raises:
        ValueError: the text is too short to hold anything out.
    """
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    count = len(tokens) // SEQUENCE
    if count < 2 * HELD_OUT_EVERY:
        needed = 2 * HELD_OUT_EVERY * SEQUENCE
        raise ValueError(f"text: expected at least {needed} tokens, found {len(tokens)}")
    blocks = tokens[: count * SEQUENCE].view(count, SEQUENCE)
    held_out = torch.arange(count) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return Blocks(blocks[~held_out], blocks[held_out], len(text.encode()) / len(tokens))


@torch.no_grad()
def nats_per_byte(model: nn.Module, blocks: Blocks, most: int = 64) -> float:
    """The mean loss on (at most) the first `most` held-out blocks."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses = [model(input_ids=b, labels=b).loss.item() for b in blocks.held_out[:most].to(device).split(1)]
    model.train(was_training)
    return sum(losses) / len(losses) / blocks.bytes_per_token
