"""`fastlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import bytes_progress, users_errors


def command(
    base: Annotated[Path, typer.Argument(help="Folder of a model's safetensors files.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter in PEFT's format.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model, or an interrupted merge of these.")],
    device: Annotated[str | None, typer.Option(help="Where to compute; default: the CPU.")] = None,
) -> None:
    """Fold an adapter into a model's files, without loading the model."""
    from ..checkpoints.merge import merge_checkpoint

    with users_errors(), bytes_progress("merging") as progress:
        merge_checkpoint(base, adapter, out, device=device, progress=progress)
    typer.echo(f"merged into {out}")
