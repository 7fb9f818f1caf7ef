"""What every command shares: where it prints, how it ends, and what the libraries below it may say meanwhile.

Exit codes: 0 when all is well, 1 when the command ran and found something wrong, 2 when its user has something to
mend, which one line on stderr names. A traceback is a defect of fastlora.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import bytes_bar

if TYPE_CHECKING:
    from rich.console import Console

FOUND_SOMETHING_WRONG = 1
USERS_ERROR = 2

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")]


def console(stderr: bool = False) -> Console:
    """A Rich console: colours and wrapped tables on a terminal; plain, unwrapped text in a pipe or with NO_COLOR."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Rich takes COLUMNS or 80 for the width of a pipe, and would cut the cells of a table down to that.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, soft_wrap=True, highlight=False, width=width)


@contextmanager
def users_errors() -> Iterator[None]:
    """Turns what the user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of the pipe has gone: nobody's error
    except (OSError, ValueError, TypeError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USERS_ERROR) from None


@contextmanager
def bytes_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes, as a function of those done and their total; a pipe gets none."""
    with bytes_bar(what, console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def quiet_libraries() -> None:
    """Keeps the notices of the libraries that a command imports from burying what it prints."""
    for library in ("transformers", "bitsandbytes"):
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
