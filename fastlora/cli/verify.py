"""`fastlora verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import FOUND_SOMETHING_WRONG, Json, bytes_progress, console, users_errors
from .merge import MoreAdapters, weights_by_folder

if TYPE_CHECKING:
    from ..checkpoints.report import Verification

ROWS = 5  # tensors in the table, worst first


def command(
    base: Annotated[Path, typer.Argument(help="Folder of a model's safetensors files.")],
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter in PEFT's format, or FOLDER=WEIGHT.")],
    merged: Annotated[Path, typer.Argument(help="Folder of the merged model, dense or int8.")],
    more: MoreAdapters = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; default: a GPU if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Check every tensor of a merged model against base + adapter, without loading the model."""
    from ..checkpoints.verify import verify_checkpoint

    with users_errors(), bytes_progress("verifying") as progress:
        adapters = weights_by_folder([adapter, *(more or [])])
        verification = verify_checkpoint(base, adapters, merged, device=device, progress=progress)
    if as_json:
        typer.echo(json.dumps(verification.to_dict()))
    else:
        _print(verification)
    if not verification.ok:
        raise typer.Exit(FOUND_SOMETHING_WRONG)


def _print(verification: Verification) -> None:
    from rich.table import Table

    screen = console()
    table = Table(
        "tensor", "kind", "error", "x rounding", "relative RMS", "problem", title="worst first", title_justify="left"
    )
    order = sorted(verification.tensors, key=lambda check: (check.problem is None, -check.share))
    for check in order[:ROWS]:
        table.add_row(
            check.name, check.kind, f"{check.error:.3g}", f"{check.share:.3g}", f"{check.relative_rms:.3%}",
            check.problem or "",
        )  # fmt: skip
    screen.print(table)
    kinds = [check.kind for check in verification.tensors]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    wrong = len(verification.problems)
    verdict = f"{wrong} of {len(kinds)} tensors are wrong" if wrong else "every tensor is base + adapter"
    screen.print(f"{verification.format}, {counts}: {verdict}", style="red" if wrong else "green")
