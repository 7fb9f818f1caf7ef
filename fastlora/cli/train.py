"""`fastlora train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console, quiet_libraries, users_errors


def command(
    config: Annotated[Path | None, typer.Argument(help="YAML file of settings.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="In place of the file's: training.epochs=3.")
    ] = None,
    settings: Annotated[bool, typer.Option("--settings", help="List every setting, its default and meaning.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and describe, but train nothing.")] = False,
) -> None:
    """Train an adapter on JSONL, text or a dataset; again, it goes on.

    The least a file needs: `model`, `data: {train: rows.jsonl}` and `out`.

    A row has messages, prompt and completion, or text. What the assistant
    says is learnt, the completion, or all of the text.

    `out` gets checkpoints, the adapter and the loss curve.
    """
    quiet_libraries()
    screen = console()
    with users_errors():
        from ..training.run import describe, prepare, run
        from ..training.settings import list_settings, read_settings

        if settings:
            typer.echo("\n".join(list_settings()))
            return
        if config is None:
            raise ValueError("CONFIG: expected a YAML file of settings, found none; --settings lists what goes in")
        prepared = prepare(read_settings(config, overrides or []))
        for line in describe(prepared):
            screen.print(line, markup=False)
        if dry_run:
            return
        adapter = run(prepared, screen)
    screen.print(f"written   {adapter}, {adapter.parent / 'loss.png'}", markup=False)
