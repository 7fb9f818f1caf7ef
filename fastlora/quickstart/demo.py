"""`fastlora quickstart`: one model from base to merged, with every claim checked on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastlora

from .text import Blocks, blocks_of, nats_per_byte, read_text
from .training import draw_losses, train

BASE = Path(__file__).parent / "base"
RANK = 16
TINY_MODEL_RATE = 1e-2
USUAL_RATE = 2e-4
MERGE_TOLERANCE = 0.01  # nats per byte: int8 rounding of the merged weights; dense merges agree far closer


@dataclass(frozen=True)
class Outcome:
    """Held-out losses in nats per byte."""

    before: float
    after: float
    reloaded: float
    merged: float
    merged_dense: float

    def problems(self) -> list[str]:
        """What did not come out as promised; empty when all did."""
        found = []
        if self.after >= self.before:
            found.append("the held-out loss did not fall")
        if self.reloaded != self.after:
            found.append("the reloaded adapter gives another loss")
        if abs(self.merged - self.after) > MERGE_TOLERANCE:
            found.append("the model merged in int8 gives another loss")
        if abs(self.merged_dense - self.after) > MERGE_TOLERANCE / 10:
            found.append("the model merged dense gives another loss")
        return found


def quickstart(
    model: str | None, text: Path | None, seconds: float, learning_rate: float | None, out: Path, console: Console
) -> Outcome:
    """Adapts a causal language model to a text, saves, reloads, merges and generates.

    Args:
        model: a folder or hub id of a causal language model; None for the embedded one.
        text: a UTF-8 file; None for Python's own documentation.
        seconds: how long to train; a slow machine takes up to three times as long.
        learning_rate: the rate to start from; None for one that suits the embedded model or a usual one.
        out: folder for the adapter and the loss curve.
    """
    _hide_loading_bars()
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    source = model or str(BASE)
    learning_rate = learning_rate or (USUAL_RATE if model else TINY_MODEL_RATE)
    patched, tokenizer = _load(source)
    blocks = blocks_of(read_text(text), tokenizer)
    _introduce(model, text, patched, blocks, console)
    prompt = tokenizer.decode(blocks.held_out[0][:48], skip_special_tokens=True)
    line_before = _generate(patched, tokenizer, prompt)
    fastlora.patch(patched, r=RANK, targets="all-linear", quantize="int8")
    fastlora.print_trainable_parameters(patched)
    before = nats_per_byte(patched, blocks)
    losses = train(patched, blocks.train, seconds, learning_rate, out, console)
    after = nats_per_byte(patched, blocks)
    line_after = _generate(patched, tokenizer, prompt)
    draw_losses(losses, before, after, blocks.bytes_per_token, out / "loss.png")
    fastlora.save(patched, out / "adapter")

    outcome = Outcome(before, after, *_deploy(source, out / "adapter", blocks))
    _report(outcome, prompt, line_before, line_after, out, console)
    return outcome


def _introduce(model: str | None, text: Path | None, patched: Any, blocks: Blocks, console: Console) -> None:
    name = escape(model or "embedded byte-level Llama")
    source = escape(str(text or "Python's documentation (pydoc_data.topics)"))
    console.print(f"[bold]base[/]      {name}, {patched.num_parameters():,d} parameters", soft_wrap=True)
    counts = f"{len(blocks.train)} blocks to train on, {len(blocks.held_out)} held out"
    console.print(f"[bold]text[/]      {source}: {counts}", soft_wrap=True)


def _deploy(source: str, adapter: Path, blocks: Blocks) -> tuple[float, float, float]:
    """Losses of a fresh base with the saved adapter: as loaded, merged in int8, and merged into dense weights."""
    fresh, _ = _load(source)
    fastlora.load(fresh, adapter, quantize="int8")
    reloaded = nats_per_byte(fresh, blocks)
    merged = nats_per_byte(fastlora.merge(fresh), blocks)
    merged_dense = nats_per_byte(fastlora.unload(fastlora.unmerge(fresh), merge=True), blocks)
    return reloaded, merged, merged_dense


def _load(source: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_gpu = torch.cuda.is_available()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if on_gpu else torch.float32)
    return model.to(device="cuda" if on_gpu else "cpu"), AutoTokenizer.from_pretrained(source)


def _generate(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after the prompt, on one line."""
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
    with torch.no_grad():
        output = model.eval().generate(**inputs, max_new_tokens=80, do_sample=False)
    return tokenizer.decode(output[0][inputs.input_ids.shape[1] :], skip_special_tokens=True)


def _report(outcome: Outcome, prompt: str, before: str, after: str, out: Path, console: Console) -> None:
    table = Table(title="held-out loss", title_justify="left")
    table.add_column("model")
    table.add_column("nats per byte", justify="right")
    table.add_column("bits per byte", justify="right")
    rows = {
        "int8 base": outcome.before,
        "after LoRA": outcome.after,
        "adapter saved and loaded into a fresh base": outcome.reloaded,
        "merged, int8": outcome.merged,
        "merged, dense": outcome.merged_dense,
    }
    for name, nats in rows.items():
        table.add_row(name, f"{nats:.4f}", f"{nats / math.log(2):.4f}")
    console.print(table)
    console.print(f"[bold]fell by[/]   {outcome.before - outcome.after:.3f} nats per byte")
    for name, text in (("prompt", prompt), ("before", before), ("after", after)):
        console.print(f"[bold]{name:9}[/] {escape(repr(text))}", soft_wrap=True)
    console.print(f"[bold]written[/]   {out / 'adapter'}, {out / 'loss.png'}")


def _hide_loading_bars() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
