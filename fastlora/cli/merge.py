"""`fastlora merge`."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Annotated

import typer

from .console import bytes_progress, users_errors

MoreAdapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="FOLDER[=WEIGHT]", help="One more adapter; may be given several times."),
]


def command(
    base: Annotated[Path, typer.Argument(help="Folder of a model's safetensors files.")],
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter in PEFT's format, or FOLDER=WEIGHT.")],
    out: Annotated[Path, typer.Argument(help="New folder for the merged model, or an interrupted merge of these.")],
    more: MoreAdapters = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; default: a GPU if there is one.")] = None,
) -> None:
    """Fold adapters into a model's files, without loading the model.

    An interrupted merge goes on where it was when it is called again. A weight multiplies what its adapter adds.
    """
    from ..checkpoints.merge import merge_checkpoint

    with users_errors(), bytes_progress("merging") as progress:
        adapters = weights_by_folder([adapter, *(more or [])])
        merge_checkpoint(base, adapters, out, device=device, progress=progress)
    typer.echo(f"merged into {out}")


def weights_by_folder(arguments: list[str]) -> dict[str | PathLike[str], float]:
    """Adapter folders with their weights, 1 where an argument has none.

    Raises:
        ValueError: a weight is no number, or a folder stands twice.
    """
    found: dict[str | PathLike[str], float] = {}
    for argument in arguments:
        folder, weight = argument, 1.0
        if "=" in argument and not Path(argument).is_dir():  # a folder's own name may have one
            folder, _, text = argument.rpartition("=")
            try:
                weight = float(text)
            except ValueError:
                raise ValueError(f"adapter: expected FOLDER=WEIGHT with a number, found {argument!r}") from None
        if folder in found:
            raise ValueError(f"adapter: expected different folders, found {folder!r} twice")
        found[folder] = weight
    return found
