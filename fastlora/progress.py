"""A progress bar for what takes long, and none for what does not or where nobody looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

Progress = bool | Callable[[int, int], None] | None

BAR_FROM = 1 << 30  # bytes; less is done before anybody wonders


def bytes_bar(what: str, console: Console) -> Bar:
    """A bar over bytes with their rate and the time left, on a terminal; nothing elsewhere."""
    from rich import progress as bars

    columns = (
        bars.TextColumn(what), bars.BarColumn(), bars.DownloadColumn(), bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )  # fmt: skip
    return bars.Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def reported(what: str, total: int, progress: Progress) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the bytes done since the last call.

    Args:
        total: bytes in all.
        progress: None for a bar on a terminal's stderr where there is much to do, True for one in any case on a
            terminal, False for none, or a function that is called with the bytes done and their total.
    """
    if callable(progress):
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        yield advance
        return
    if progress is False or (progress is None and total < BAR_FROM):
        yield lambda count: None
        return
    from rich.console import Console

    with bytes_bar(what, Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
