"""The `fastlora` command."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """LoRA for Hugging Face models on fused kernels."""


@app.command()
def quickstart(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a causal LM; default: a small embedded one.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to adapt to; default: Python's documentation.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long to train.")] = 30,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Learning rate; default: 2e-4 for your own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the adapter and the loss curve.")] = Path("quickstart-out"),
) -> None:
    """Adapt, save, reload, merge and use a model, end to end."""
    # The command prints what matters; the notices of the libraries that it imports would bury it.
    for library in ("transformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    from rich.console import Console
    from rich.markup import escape

    from ..quickstart.demo import quickstart as run

    console = Console()
    try:
        outcome = run(model, text, seconds, learning_rate, out, console)
    except (OSError, ValueError) as error:
        console.print("[red]error[/]", escape(str(error)), highlight=False)
        raise typer.Exit(2) from None
    for problem in outcome.problems():
        console.print(f"[red]failed[/] {problem}")
    if outcome.problems():
        raise typer.Exit(1)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="Folder of a model's safetensors files.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model, or an interrupted merge of these.")],
    device: Annotated[str | None, typer.Option(help="Where to compute; default: the CPU.")] = None,
) -> None:
    """Fold an adapter into a model's files, without loading the model."""
    from rich import progress
    from rich.console import Console

    from ..checkpoints.merge import merge_checkpoint

    console = Console(soft_wrap=True)
    columns = (
        progress.TextColumn("merging"), progress.BarColumn(), progress.DownloadColumn(),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
    )  # fmt: skip
    try:
        # A pipe gets no bar, and its reader the last line alone.
        with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("merging", total=None)
            merge_checkpoint(
                base, adapter, out, device=device,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
    except (OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"merged into {out}")
