"""The `fastlora` command: a file per subcommand, whose `command` it runs."""

from __future__ import annotations

import typer

from . import env, export, merge, plan, quickstart, train, verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

for module in (quickstart, plan, train, merge, export, verify, env):
    app.command(module.__name__.rpartition(".")[-1])(module.command)


@app.callback()
def main() -> None:
    """LoRA for Hugging Face models on fused kernels.

    Exit codes: 0 fine, 1 found something wrong, 2 yours to mend.
    """
