"""`fastlora env`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .console import FOUND_SOMETHING_WRONG, Json, console, quiet_libraries

if TYPE_CHECKING:
    from rich.console import Console

    from ..environment import Check, Environment


def command(
    test: Annotated[
        bool, typer.Option("--test/--no-test", help="Hold what would run to the float64 reference.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show versions, processors and kernels, and test that these compute what they should.

    Exit code 1 says that a kernel does not.
    """
    quiet_libraries()
    import fastlora

    from ..environment import find_environment, self_test

    found, checks = find_environment(), self_test() if test else []
    if as_json:
        report = {"fastlora": fastlora.__version__} | found.to_dict() | {"checks": [asdict(c) for c in checks]}
        typer.echo(json.dumps(report, indent=2))
    else:
        screen = console()
        screen.print(f"fastlora {fastlora.__version__}")
        _print_environment(found, screen)
        _print_checks(checks, screen)
    if not all(check.passed for check in checks):
        raise typer.Exit(FOUND_SOMETHING_WRONG)


def _print_environment(found: Environment, screen: Console) -> None:
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.versions.items())
    screen.print(f"versions   {versions}", markup=False)
    cpu = found.cpu
    screen.print(f"cpu        {cpu['name']}, {cpu['instructions']}, {cpu['threads']} threads{_size(cpu['memory'])}")
    for gpu in found.gpus:
        screen.print(f"gpu        {gpu['name']}, compute capability {gpu['compute_capability']}{_size(gpu['memory'])}")
    if not found.gpus:
        screen.print("gpu        none that this PyTorch can use")
    for inputs, words in found.kernels.items():
        screen.print(f"kernels    {inputs}: {words}", markup=False)
    for name, value in found.variables.items():
        screen.print(f"variable   {name}={value}", markup=False)


def _size(memory: int | None) -> str:
    return "" if memory is None else f", {memory / 2**30:,.1f} GiB"


def _print_checks(checks: list[Check], screen: Console) -> None:
    from rich.table import Table

    if not checks:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("operator", "device", "dtype", "weights", "max error", "eager's", ""):
        table.add_column(heading)
    for check in checks:
        verdict = "[green]ok[/]" if check.passed else "[red]wrong[/]"
        errors = f"{check.error:.2e}", f"{check.eager:.2e}"
        table.add_row(check.operator, check.device, check.dtype, check.weights, *errors, verdict)
    screen.print("\nerrors against the float64 reference")
    screen.print(table)
    wrong = sum(not check.passed for check in checks)
    screen.print(f"[red]failed[/] {wrong} of {len(checks)} checks" if wrong else f"{len(checks)} checks passed")
