"""A training run that is killed from outside, or by itself when it has touched its output folder so many times."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from models import make_model
from safetensors.torch import load_file
from training import TARGETS, make_trainer, trained
from transformers import TrainerCallback

import fastlora

STEPS, EVERY, KEPT = 16, 2, 2
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Started(TrainerCallback):
    """Says when training begins."""

    def __init__(self, event: Any) -> None:
        self.event = event

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.event.set()


def train(folder: Path, started: Any = None, changes_to_live: int | None = None) -> dict[str, torch.Tensor]:
    """Trains to the end, from the last whole checkpoint in the folder; returns the adapter.

    Args:
        started: an event to set when training begins.
        changes_to_live: after how many changes in the folder the process kills itself.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = fastlora.patch(make_model("llama"), r=4, targets=TARGETS, dropout=0.1, quantize="int8")
    callbacks = [] if started is None else [Started(started)]
    trainer = make_trainer(
        model, folder, max_steps=STEPS, save_steps=EVERY, save_total_limit=KEPT, callbacks=callbacks
    )  # fmt: skip
    resume = fastlora.last_checkpoint(folder)
    if changes_to_live is not None:
        _kill_after(changes_to_live, str(folder))
    if resume == str(folder / f"checkpoint-{STEPS}"):  # the Trainer would train a step more
        return load_file(Path(resume, "model.safetensors"))
    trainer.train(resume_from_checkpoint=resume)
    return trained(model)


def _kill_after(changes: int, folder: str) -> None:
    left = changes

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        # A folder is deleted relative to its descriptor, so that its files' names have no path.
        if event in CHANGES or (writes and folder in str(arguments[0])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
