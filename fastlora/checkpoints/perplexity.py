"""Perplexity of the merged model and of an exported one on a text: the one place here that loads models."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.files import load
from ..adapters.registry import set_adapter, set_scale
from .report import ExportReport

WINDOW = 1024  # tokens read at once, less where the model takes less
NEEDED = {"int8": "compressed_tensors", "w8a8": "compressed_tensors", "bnb8": "bitsandbytes"}
ADAPTERS = ("peft", "portable")


def check_text(base: Path, text: str, to: str) -> None:
    """Raises ValueError where perplexity on the text cannot be measured."""
    if to in ADAPTERS:
        raise ValueError(f"text: expected with a merged format, found with {to!r}")
    if to in NEEDED and importlib.util.find_spec(NEEDED[to]) is None:
        raise ValueError(
            f"text: expected {NEEDED[to]} installed, with which transformers loads {to!r}, found it missing"
        )
    _check_causal(base)
    tokens = _tokens(base, text)
    if tokens.numel() < 2:
        raise ValueError(f"text: expected at least two tokens, found {tokens.numel()}")


def _check_causal(base: Path) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        known = type(AutoConfig.from_pretrained(base, trust_remote_code=False)) in MODEL_FOR_CAUSAL_LM_MAPPING
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text: expected a causal language model that transformers has, found {_first_line(error)}"
        ) from None
    if not known:
        raise ValueError(f"text: expected a causal language model, found another kind in {str(base)!r}")


def perplexities(
    report: ExportReport, base: Path, folders: dict[Path, float], out: Path, text: str, device: torch.device | str
) -> ExportReport:
    """The report with the perplexity of the base with its adapters, and of the exported model, loaded in turn."""
    tokens = _tokens(base, text)
    before = perplexity(_adapted(base, folders, device), tokens)
    return replace(report, perplexity=(before, perplexity(_model(out, device), tokens)))


def _adapted(base: Path, folders: dict[Path, float], device: torch.device | str) -> nn.Module:
    model = _model(base, device)
    names = {str(index): folder for index, folder in enumerate(folders)}
    for name, folder in names.items():
        load(model, folder, adapter=name)
    set_adapter(model, list(names))
    for name, folder in names.items():
        set_scale(model, name, folders[folder])
    return model


def _tokens(base: Path, text: str) -> Tensor:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"text: expected a tokenizer in {str(base)!r}, found {_first_line(error)}") from None
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _model(folder: Path, device: torch.device | str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    return model.to(device).eval()


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor) -> float:
    """`exp` of the mean negative log-likelihood of each token given those before it in its window."""
    window = min(WINDOW, getattr(model.config, "max_position_embeddings", None) or WINDOW)
    total, count = 0.0, 0
    # Windows share one token, so that each but the first is predicted once.
    for start in range(0, len(tokens) - 1, window - 1):
        ids = tokens[start : start + window].to(model.device)[None]
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return math.exp(total / count)
