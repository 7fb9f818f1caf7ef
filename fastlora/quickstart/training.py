"""Fine-tuning with the transformers Trainer for a number of seconds, the learning rate falling to zero at the end.

A machine too slow for `LEAST_STEPS` in that time goes on until it has done them, for up to `PATIENCE` times as long.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

BATCH = 8
LEAST_STEPS = 200
PATIENCE = 3


class TimeBudget(TrainerCallback):
    """Stops training when its seconds are over, draws a progress bar and keeps the losses."""

    def __init__(self, seconds: float, console: Console):
        self.seconds = seconds
        self.losses: list[tuple[int, float]] = []
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console)
        self.task = self.progress.add_task("training", total=seconds)
        self.start = time.monotonic()

    def remaining(self, step: int) -> float:
        """The share of the training that is left after a number of steps."""
        elapsed = (time.monotonic() - self.start) / self.seconds
        return max(0.0, 1 - max(min(elapsed, step / LEAST_STEPS), elapsed / PATIENCE))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        remaining = self.remaining(state.global_step)
        self.progress.update(self.task, completed=(1 - remaining) * self.seconds)
        control.should_training_stop = remaining == 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))
            self.progress.update(self.task, description=f"training, loss {logs['loss']:.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()


def train(
    model: nn.Module, blocks: Tensor, seconds: float, learning_rate: float, out: Path, console: Console
) -> list[tuple[int, float]]:
    """Trains what is trainable on token blocks; returns (step, loss in nats per token)."""
    budget = TimeBudget(seconds, console)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1000,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.remaining)
    examples = [{"input_ids": block, "labels": block} for block in blocks]
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, callbacks=[budget], optimizers=(optimizer, schedule)
    )
    trainer.remove_callback(PrinterCallback)  # it prints raw dictionaries where the Trainer's own bar is off
    trainer.train()
    return budget.losses


def draw_losses(losses: list[tuple[int, float]], before: float, after: float, scale: float, file: Path) -> None:
    """A PNG of the training loss, with the held-out loss before and after; `scale` is bytes per token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    steps = [step for step, _ in losses]
    axes.plot(steps, [loss / scale for _, loss in losses], label="training", color="tab:blue")
    axes.plot([0, steps[-1]], [before, after], "o", label="held out, before and after", color="tab:orange")
    axes.set(xlabel="step", ylabel="nats per byte", title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)
