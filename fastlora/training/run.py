"""A run of `fastlora train`: every check that costs little first, then the model, then the training."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

import fastlora

from ..checkpoints.shards import published
from .data import Row, read_rows
from .sequences import Sequence, length_of, make_sequences, set_chat_template
from .settings import Settings

RECORD = "fastlora-train.json"
# What a run that goes on may change.
_FREE = ("resume", "out", "training.epochs", "training.max_steps", "training.log_every", "training.save_every",
         "training.eval_every", "training.keep", "training.compile", "training.batch_size",
         "training.accumulation")  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What a run is about to do.

    Attributes:
        rows, held_out: sequences to train on, and to evaluate on.
        length: tokens in the longest sequence.
        resume: the checkpoint to go on from, if any.
    """

    settings: Settings
    tokenizer: Any
    model_config: Any
    rows: list[Sequence]
    held_out: list[Sequence]
    length: int
    resume: str | None

    @property
    def dtype(self) -> torch.dtype:
        name = self.settings.dtype
        if name == "auto":
            name = "bfloat16" if torch.cuda.is_available() else "float32"
        return getattr(torch, name)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, as the Trainer counts them."""
        training = self.settings.training
        if training.max_steps is not None:
            return training.max_steps
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        batches = math.ceil(len(self.rows) / (training.batch_size * processes))
        return math.ceil(training.epochs * max(1, math.ceil(batches / training.accumulation)))

    @property
    def lora(self) -> fastlora.LoraConfig:
        chosen = self.settings.lora.model_dump(exclude={"r", "targets", "alpha", "dropout", "quantize", "compute"})
        lora = self.settings.lora
        return fastlora.LoraConfig(
            r=lora.r, target_modules=lora.targets, lora_alpha=lora.r if lora.alpha is None else lora.alpha,
            lora_dropout=lora.dropout, task_type="CAUSAL_LM", **chosen,
        )  # fmt: skip


def prepare(settings: Settings) -> Prepared:
    """Checks the output folder, reads and tokenises the data, and finds where to go on from. Trains nothing.

    Raises:
        ValueError, TypeError, OSError, ImportError: something is for the user to mend.
    """
    from transformers import AutoConfig, AutoTokenizer

    _check_writable(settings.out)
    resume = _checkpoint(settings)
    rows, held_out = read_rows(settings.data)
    config = AutoConfig.from_pretrained(settings.model)
    length = length_of(settings.data, getattr(config.get_text_config(), "max_position_embeddings", None))
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    set_chat_template(tokenizer, settings.data.chat_template)

    def sequences(found: list[Row]) -> list[Sequence]:
        return make_sequences(found, tokenizer, settings.data, length) if found else []

    return Prepared(settings, tokenizer, config, sequences(rows), sequences(held_out), length, resume)


def describe(prepared: Prepared) -> list[str]:
    """What will be trained on what, for how long and in how much memory, in lines."""
    settings, training = prepared.settings, prepared.settings.training
    tokens = sum(len(row["input_ids"]) for row in prepared.rows)
    found = fastlora.plan(
        prepared.model_config, config=prepared.lora, quantize=settings.lora.quantize, batch=training.batch_size,
        length=min(prepared.length, max(len(row["input_ids"]) for row in prepared.rows)),
        checkpointing=training.checkpointing != "none", dtype=prepared.dtype,
    )  # fmt: skip
    share = 100 * found.trainable / found.parameters
    peak = "" if found.memory.peak is None else f", {found.memory.peak / 2**20:,.0f} MiB at the peak of a step"
    start = f"goes on from {prepared.resume}" if prepared.resume else "starts anew"
    return [
        f"model     {settings.model}: {found.model} in {found.dtype}{peak}",
        f"adapter   rank {settings.lora.r}, {found.trainable:,d} parameters, {share:.4f} % of {found.parameters:,d}",
        f"data      {settings.data.train}: {len(prepared.rows)} sequences, {tokens:,d} tokens, at most "
        f"{prepared.length} each; {len(prepared.held_out)} held out",
        f"training  {prepared.steps} steps of {training.batch_size * training.accumulation} sequences",
        f"out       {settings.out}: {start}",
        *(f"note      {note}" for note in found.notes),
    ]


def run(prepared: Prepared, console: Console) -> Path:
    """Trains, and returns the folder of the adapter.

    Raises:
        ValueError, TypeError, OSError: as in `prepare` and `fastlora.patch`.
    """
    from transformers.utils import logging

    from .progress import draw_curve
    from .trainer import make_trainer

    settings = prepared.settings
    if not console.is_terminal:
        logging.disable_progress_bar()
    trainer, model = make_trainer(prepared, console)
    if trainer.is_world_process_zero():
        _write_record(settings)
    # Asked to go on from its own end, the Trainer would train a step more.
    if prepared.resume is not None and _state(prepared.resume)["global_step"] >= prepared.steps:
        console.print(f"{settings.out} holds the whole run already: {prepared.steps} steps", markup=False)
        model.load_state_dict(load_file(Path(prepared.resume, "model.safetensors")), strict=False)
        history = _state(prepared.resume)["log_history"]
    else:
        trainer.train(resume_from_checkpoint=prepared.resume)
        history = trainer.state.log_history
    adapter = settings.out / "adapter"
    if trainer.is_world_process_zero():
        fastlora.save(model, adapter)
        prepared.tokenizer.save_pretrained(adapter)
        draw_curve(history, settings.out / "loss.png")
    return adapter


def _check_writable(out: Path) -> None:
    """Raises OSError, before any work, where the folder cannot be written to."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"out: expected a folder that can be written to, found {error}") from None


def _checkpoint(settings: Settings) -> str | None:
    """The checkpoint that the run goes on from."""
    found = fastlora.last_checkpoint(settings.out)
    folder, record = str(settings.out), settings.out / RECORD
    if any(settings.out.glob("checkpoint-*")) and not settings.resume:
        raise ValueError(f"out: expected no checkpoints where resume is false, found some in {folder!r}")
    if found is None:
        return None
    if not record.is_file():
        raise ValueError(f"out: expected checkpoints of this command, found those of another in {folder!r}")
    before, now = _flat(json.loads(record.read_text(encoding="utf-8"))), _flat(settings.model_dump(mode="json"))
    changed = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    if changed:
        differences = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in changed)
        raise ValueError(
            f"out: expected a folder of this run, found {folder!r} of one with other settings: {differences}; choose "
            "another folder"
        )
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and not name.endswith("_pattern")
        flat |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return flat


def _write_record(settings: Settings) -> None:
    with published(settings.out / RECORD) as output:
        output.write(json.dumps(settings.model_dump(mode="json"), indent=2).encode())


def _state(checkpoint: str) -> dict[str, Any]:
    return json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))
