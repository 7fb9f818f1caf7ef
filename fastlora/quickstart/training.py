"""Fine-tuning with the transformers Trainer for a number of seconds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

BATCH = 8
LEARNING_RATE = 5e-3


class TimeBudget(TrainerCallback):
    """Stops training when its seconds are over, draws a progress bar and keeps the losses."""

    def __init__(self, seconds: float, console: Console):
        self.seconds = seconds
        self.losses: list[tuple[int, float]] = []
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("training", total=seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        elapsed = time.monotonic() - self.start
        self.progress.update(self.task, completed=min(elapsed, self.seconds))
        control.should_training_stop = elapsed >= self.seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))
            self.progress.update(self.task, description=f"training, loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def train(model: nn.Module, blocks: Tensor, seconds: float, out: Path, console: Console) -> list[tuple[int, float]]:
    """Trains what is trainable on token blocks; returns (step, loss in nats per token)."""
    budget = TimeBudget(seconds, console)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        num_train_epochs=1000,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[budget])
    trainer.remove_callback(_printer(trainer))
    trainer.train()
    return budget.losses


def _printer(trainer: Trainer) -> Any:
    """The callback that prints raw log dictionaries when the Trainer's own progress bar is off."""
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def draw_losses(losses: list[tuple[int, float]], before: float, after: float, scale: float, file: Path) -> None:
    """A PNG of the training loss, with the held-out loss before and after; `scale` is bytes per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [step for step, _ in losses]
    axes.plot(steps, [loss / scale for _, loss in losses], label="training", color="tab:blue")
    axes.plot([0, steps[-1]], [before, after], "o--", label="held out", color="tab:orange")
    axes.set(xlabel="step", ylabel="nats per byte", title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
