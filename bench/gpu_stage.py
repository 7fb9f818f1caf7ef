"""What a stage of `make gpu` keeps to: its time, and a GPU that an error has made useless to a process.

As a pytest plugin (`-p gpu_stage`): past the stage's time the remaining tests are skipped, so that the results of the
others are written; and where a kernel has broken the process' GPU the process ends, since every later test would fail
for no fault of its own. A stage that ends so is started again and goes on after the tests that it had begun.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from gpu_run import BEGUN, BROKEN_GPU, UNTIL


def seconds_left(default: float = 1e9) -> float:
    """Until the stage must have ended; `default` where this is no stage."""
    until = os.environ.get(UNTIL)
    return default if until is None else float(until) - time.time()


def gpu_is_broken() -> bool:
    """Whether an error has left this process' GPU unusable, such as an access to memory that is not its own."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _begun() -> set[str]:
    """The tests that earlier processes of this stage began."""
    file = os.environ.get(BEGUN)
    return set(Path(file).read_text().splitlines()) if file and Path(file).exists() else set()


_before = _begun()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if seconds_left() < 0:
        pytest.skip("the time of the stage was over")
    if item.nodeid in _before:
        pytest.skip("began before the GPU broke")
    if file := os.environ.get(BEGUN):
        with open(file, "a") as lines:
            lines.write(f"{item.nodeid}\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and gpu_is_broken():
        print(f"\n{report.nodeid} broke the GPU for this process:\n{report.longreprtext[-2000:]}", flush=True)
        os._exit(BROKEN_GPU)
