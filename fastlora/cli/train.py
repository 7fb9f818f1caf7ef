"""`fastlora train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, quiet_libraries, users_errors


def command(
    config: Annotated[Path, typer.Argument(help="YAML file of settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="In place of the file's: training.epochs=3.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and describe, but train nothing.")] = False,
) -> None:
    """Train an adapter on JSONL, text or a dataset, and go on where the last run ended.

    The least a file needs: `model`, `data: {train: rows.jsonl}` and `out`. A row has messages (by the chat template;
    the assistant's are learnt), prompt and completion (which is learnt), or text. In `out` are the checkpoints, the
    adapter and the loss curve.
    """
    quiet_libraries()
    screen = console()
    with users_errors():
        from ..training.run import describe, prepare, run
        from ..training.settings import read_settings

        prepared = prepare(read_settings(config, overrides or []))
        for line in describe(prepared):
            screen.print(line, markup=False)
        if dry_run:
            return
        adapter = run(prepared, screen)
    screen.print(f"written   {adapter}, {adapter.parent / 'loss.png'}", markup=False)
