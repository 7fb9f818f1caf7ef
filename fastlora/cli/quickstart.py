"""`fastlora quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import FOUND_SOMETHING_WRONG, console, quiet_libraries, users_errors


def command(
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
    quiet_libraries()
    from ..quickstart.demo import quickstart

    screen = console()
    with users_errors():
        outcome = quickstart(model, text, seconds, learning_rate, out, screen)
    for problem in outcome.problems():
        screen.print(f"[red]failed[/] {problem}")
    if outcome.problems():
        raise typer.Exit(FOUND_SOMETHING_WRONG)
