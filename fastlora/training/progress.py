"""What a run shows while it goes on, and the curve of its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..checkpoints.shards import published


class Display(TrainerCallback):
    """A bar on a terminal, and a line per log elsewhere."""

    def __init__(self, console: Console):
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        shown = {name: value for name, value in (logs or {}).items() if name in ("loss", "eval_loss")}
        if not shown or not state.is_world_process_zero:
            return
        words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items())
        self.bar.update(self.task, description=f"training, {words}")
        if not self.console.is_terminal:
            self.console.print(f"step {state.global_step} of {state.max_steps}: {words}", markup=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


def draw_curve(history: list[dict[str, Any]], file: Path) -> None:
    """A PNG of the losses in a Trainer's log, in nats per token, over the steps of the whole run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, label, mark in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(log["step"], log[name]) for log in history if name in log]
        if points:
            axes.plot(*zip(*points, strict=True), mark, label=label)
    axes.set(xlabel="step", ylabel="nats per token", title="LoRA fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend()
    with published(file) as output:
        figure.savefig(output, dpi=150, format="png")
