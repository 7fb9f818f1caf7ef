"""What the benchmarks share: the quick mode, and the fixtures that time side by side and keep the rows."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import Builder, DeviceClock, failures, machine, prepare
from gpu_layers import Place
from harness import (
    RESULTS,
    Laps,
    Row,
    append_rows,
    results_file,
    rounds_within,
    rows_from_samples,
    rows_not_run,
    wall_clock,
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few rounds of the main rows, to a file of their own")
    parser.addoption("--tiny", action="store_true", help="GPU contenders once at tiny sizes on any device, unrecorded")
    parser.addoption("--results", type=Path, default=RESULTS, help="folder for the rows")


def pytest_collection_modifyitems(config, items):
    reasons = []
    if config.getoption("--quick"):
        reasons.append(("full", "not in a quick run"))
    if not torch.cuda.is_available() and not config.getoption("--tiny"):
        reasons.append(("gpu", "there is no GPU"))
    for marker, reason in reasons:
        for item in items:
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def place(request) -> Place:
    """Where a GPU benchmark runs, and whether at its real sizes."""
    return Place("cuda" if torch.cuda.is_available() else "cpu", request.config.getoption("--tiny"))


@pytest.fixture
def record(request, quick, capsys) -> Callable[[list[Row]], None]:
    """Writes rows to the results file, and says so; at tiny sizes they mean nothing and are dropped."""
    facts = machine() if request.node.get_closest_marker("gpu") and torch.cuda.is_available() else None
    tiny, folder = request.config.getoption("--tiny"), request.config.getoption("--results")

    def write(rows: list[Row]) -> None:
        if tiny:
            return
        append_rows(results_file(quick, facts, folder), rows, facts)
        with capsys.disabled():
            for row in rows:
                ratios = "".join(f"  {ratio:.3f} x {name}" for name, ratio in row.ratios.items())
                figure = row.note if row.median is None else f"{row.median:.4g} {row.unit}"
                print(f"\n  {row.question}, {row.case}: {row.contender} {figure}{ratios}", end="", file=sys.stdout)

    return write


@pytest.fixture
def interleaved(benchmark, quick) -> Callable[..., Laps]:
    """Times contenders in turn under pytest-benchmark, whose own figure is the whole round."""

    def run(contenders: dict[str, Callable[[], Any]], seconds: float = 10.0, timed: Any = wall_clock) -> Laps:
        laps = Laps(contenders, timed)
        lap = laps.warm_up()
        if lap is None:
            benchmark.pedantic(lambda: None)
        else:
            benchmark.pedantic(laps, rounds=3 if quick else rounds_within(seconds, lap), iterations=1)
        return laps

    return run


@pytest.fixture
def compare(interleaved, record, benchmark) -> Callable[..., None]:
    """Times contenders in turn and keeps a row for each, with its ratio to each of `over`."""

    def run(question: str, case: str, contenders: dict[str, Callable[[], Any]], over: list[str]) -> None:
        rows = rows_from_samples(question, case, interleaved(contenders), over)
        benchmark.extra_info["rows"] = [vars(row) for row in rows]
        record(rows)

    return run


@pytest.fixture
def race(interleaved, record, benchmark, place) -> Callable[..., None]:
    """The same on a GPU: contenders are built one by one, and one that cannot run becomes a row with the reason."""

    def run(
        question: str, case: str, builders: dict[str, Builder], over: list[str], *, graphed: bool = False,
        launch_bound: bool = False, seconds: float = 1.5, sizes: dict[str, int] | None = None,
        work: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        ready, notes = prepare(builders, graphed and place.device == "cuda", strict=place.tiny)
        if place.tiny:
            benchmark.pedantic(lambda: [lap() for lap in ready.values()])
            return
        laps = interleaved(ready, seconds, DeviceClock(launch_bound)) if ready else Laps({})
        rows = rows_from_samples(question, case, laps, over, "us", 1e6, sizes, work) + rows_not_run(
            question, case, notes
        )
        benchmark.extra_info["rows"] = [vars(row) for row in rows]
        record(rows)
        assert not failures(notes)

    return run


@pytest.fixture(autouse=True)
def _quiet_and_reproducible():
    """bitsandbytes says at every call that it casts to float16, which is no news here and takes time to say."""
    torch.manual_seed(0)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
