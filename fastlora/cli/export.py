"""`fastlora export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Json, bytes_progress, console, quiet_libraries, users_errors
from .merge import MoreAdapters, weights_by_folder

if TYPE_CHECKING:
    from ..checkpoints.report import ExportReport

TO = "peft, portable (for vLLM and llama.cpp), bf16, fp16, fp32, int8 (W8A16, the default), w8a8 or bnb8."
ROWS = 5  # layers in the table, worst first


def command(
    base: Annotated[Path, typer.Argument(help="Folder of a model's safetensors files.")],
    adapter: Annotated[str, typer.Argument(help="Folder of an adapter in PEFT's format, or FOLDER=WEIGHT.")],
    out: Annotated[Path, typer.Argument(help="New folder for the export, or an interrupted export of these.")],
    to: Annotated[str | None, typer.Option(help=TO)] = None,
    portable: Annotated[bool, typer.Option("--portable", help="Short for --to portable.")] = False,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure the perplexity on; loads the model.")] = None,
    more: MoreAdapters = None,
    device: Annotated[str | None, typer.Option(help="Where to compute; default: a GPU if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Write a base and an adapter as what servers load: an adapter, a merged model, or a merged int8 one."""
    quiet_libraries()
    from ..checkpoints.export import export_checkpoint

    with users_errors():
        if portable and to not in (None, "portable"):
            raise ValueError(f"--portable: expected without --to, found {to!r}")
        content = None if text is None else text.read_text(encoding="utf-8")
        chosen = "portable" if portable else to or "int8"
        with bytes_progress("exporting") as progress:
            adapters = weights_by_folder([adapter, *(more or [])])
            report = export_checkpoint(base, adapters, out, to=chosen, text=content, device=device, progress=progress)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _print(report, out)


def _print(report: ExportReport, out: Path) -> None:
    from rich.table import Table

    screen = console()
    for note in report.notes:
        screen.print(note)
    if report.errors:
        table = Table("weight", "relative RMS error", title="int8 weights, worst first", title_justify="left")
        for error in sorted(report.errors, key=lambda error: -error.relative_rms)[:ROWS]:
            table.add_row(error.name, f"{error.relative_rms:.3%}")
        if len(report.errors) > ROWS:
            table.add_row(f"and {len(report.errors) - ROWS} more", "")
        screen.print(table)
    if report.perplexity is not None:
        before, after = report.perplexity
        screen.print(f"perplexity {before:.4f} merged, {after:.4f} exported ({after / before - 1:+.2%})")
    screen.print(f"exported as {report.format} into {out}: {report.bytes:,} bytes of weights", markup=False)
