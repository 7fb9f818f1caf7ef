"""`fastlora plan`."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Json, console, quiet_libraries, users_errors

if TYPE_CHECKING:
    from rich.console import Console

    from ..planning import Plan


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def command(
    model: Annotated[
        str, typer.Argument(help="Folder of a model or of an adapter, a config.json, or a hub id in the local cache.")
    ],
    r: Annotated[int, typer.Option("--r", help="Rank.")] = 8,
    targets: Annotated[
        str | None, typer.Option(help="Names with commas between, a regular expression, or all-linear.")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8 for the targets' frozen weights.")] = None,
    dropout: Annotated[float, typer.Option(help="Of the adapters' inputs.")] = 0.0,
    batch: Annotated[int, typer.Option(help="Rows in a step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 512,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, adafactor or sgd.")] = "adamw",
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; default: the config's.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu, there or not; default: what is there.")] = None,
    arch: Annotated[int | None, typer.Option(help="Of a GPU that is not there, such as 90 for an H100.")] = None,
    as_json: Json = False,
) -> None:
    """Show what computes each module, what trains, and the memory of a training step.

    Works from a config alone: nothing is downloaded, and no weights are made.
    """
    quiet_libraries()
    with users_errors():
        import torch

        import fastlora

        found = fastlora.plan(
            model, r, _names(targets), dropout=dropout, quantize=quantize, batch=batch, length=length,
            checkpointing=checkpointing, optimizer=optimizer, dtype=getattr(torch, dtype) if dtype else None,
            device=device, arch=arch,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        _print(found, console())


def _names(targets: str | None) -> list[str] | str | None:
    """A list where there are commas or plain words; anything else is a regular expression or a word of its own."""
    if targets is None or targets == "all-linear":
        return targets
    names = [name.strip() for name in targets.split(",")]
    plain = all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    return names if plain else targets


def _print(plan: Plan, screen: Console) -> None:
    from rich.table import Table

    by = list(dict.fromkeys(row.computed_by for row in plan.rows))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("module", "left"), ("count", "right"), ("shape", "left"), ("weights", "left"),
                             ("rank", "right"), ("trains", "right"), ("MiB", "right"), ("by", "right")):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in plan.rows:
        trains = f"{row.trainable / row.parameters:.2%}" if row.trainable else ""
        table.add_row(
            row.name, str(row.count), " x ".join(map(str, row.shape)), row.stored, str(row.rank or ""), trains,
            f"{row.bytes / 2**20:,.1f}", str(by.index(row.computed_by) + 1),
            style="" if row.trainable else "dim",
        )  # fmt: skip
    screen.print(f"{plan.model} in {plan.dtype} on {plan.device}")
    screen.print(table)
    for index, words in enumerate(by):
        screen.print(f"by {index + 1}: {words}", markup=False)
    share = 100 * plan.trainable / plan.parameters
    screen.print(
        f"\ntrainable params: {plan.trainable:,d} || all params: {plan.parameters:,d} || trainable%: {share:.4f}"
    )
    _print_memory(plan, screen)
    for note in plan.notes:
        screen.print(f"[yellow]note[/] {_escaped(note)}")


def _print_memory(plan: Plan, screen: Console) -> None:
    from rich.table import Table

    saving = ", checkpointed" if plan.checkpointing else ""
    screen.print(f"\nmemory of a step of {plan.batch} x {plan.length} tokens{saving}, {plan.optimizer}")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("weights", "adapters", "gradients", "optimizer", "activations", "peak"):
        size = getattr(plan.memory, name)
        table.add_row(name, "not counted" if size is None else f"{size / 2**20:,.1f} MiB")
    screen.print(table)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
