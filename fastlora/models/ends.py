"""The two ends of a language model: its input embedding and its output head."""

from __future__ import annotations

from typing import Any

from torch import nn


def input_embedding(model: Any) -> nn.Module | None:
    """The module that turns token ids into vectors, where the model says which one it is."""
    return _ask(model, "get_input_embeddings")


def output_embedding(model: Any) -> nn.Module | None:
    """The module that produces the logits, where the model says which one it is."""
    return _ask(model, "get_output_embeddings")


def _ask(model: Any, method: str) -> nn.Module | None:
    get = getattr(model, method, None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):  # what models without such a module raise
        return None
    return found if isinstance(found, nn.Module) else None
