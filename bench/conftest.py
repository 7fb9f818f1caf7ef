"""What the benchmarks share: the quick mode, and the fixtures that time side by side and keep the rows."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Laps, Row, append_rows, results_file, rounds_within, rows_from_samples

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="few rounds of the main rows, to a file of their own")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: measures on the CPU")
    config.addinivalue_line("markers", "full: left out by --quick")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        skipped = pytest.mark.skip(reason="not in a quick run")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skipped)


@pytest.fixture
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def record(quick, capsys) -> Callable[[list[Row]], None]:
    """Writes rows to the results file, and says so."""

    def write(rows: list[Row]) -> None:
        append_rows(results_file(quick), rows)
        with capsys.disabled():
            for row in rows:
                ratios = "".join(f"  {ratio:.3f} x {name}" for name, ratio in row.ratios.items())
                print(f"\n  {row.question}, {row.case}: {row.contender} {row.median:.4g} {row.unit}{ratios}", end="")

    return write


@pytest.fixture
def interleaved(benchmark, quick) -> Callable[..., Laps]:
    """Times contenders in turn under pytest-benchmark, whose own figure is the whole round."""

    def run(contenders: dict[str, Callable[[], Any]], seconds: float = 10.0) -> Laps:
        laps = Laps(contenders)
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


@pytest.fixture(autouse=True)
def _quiet_and_reproducible():
    """bitsandbytes says at every call that it casts to float16, which is no news here and takes time to say."""
    torch.manual_seed(0)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
