"""Side-by-side timing: every contender once a round, in turn, so that a drift of the machine hits all of them alike.

A measurement becomes rows, one per contender, and each row carries its ratios to other contenders of the same run
together with the machine, the versions, the commit and the date. Rows are written as soon as they exist.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SLOW_ROUND = 60
LIBRARIES = {
    "torch": "torch", "triton": "triton", "transformers": "transformers", "peft": "peft",
    "bitsandbytes": "bitsandbytes", "torchao": "torchao", "gemlite": "gemlite", "fastlora": "fastlora-triton",
}  # fmt: skip


def wall_clock(contender: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    contender()
    return time.perf_counter() - start


@dataclass
class Laps:
    """Contenders that run once each per call, in order, timed one by one in seconds by `timed`.

    `others` is how many cores other processes kept busy meanwhile: above a tenth or so, times and ratios are in doubt.
    """

    contenders: dict[str, Callable[[], Any]]
    timed: Callable[[Callable[[], Any]], float] = wall_clock
    samples: dict[str, list[float]] = field(default_factory=dict)
    others: float | None = None
    _start: tuple[float, float | None] | None = None

    def __call__(self) -> None:
        # The collector would charge one contender for the garbage of another.
        gc.disable()
        for name, contender in self.contenders.items():
            self.samples.setdefault(name, []).append(self.timed(contender))
        gc.enable()
        self.others = self._busy_cores_of_others()

    def warm_up(self) -> float | None:
        """Two rounds whose samples are dropped; returns how many seconds the second took.

        Where the first takes over `SLOW_ROUND` seconds it is kept as the only one, and None returned: what a first
        call costs besides is little of that.
        """
        self._start = time.perf_counter(), cpu_seconds_of_others()
        self()
        start = time.perf_counter()
        if start - self._start[0] > SLOW_ROUND:
            return None
        self()
        self.samples.clear()
        self._start = time.perf_counter(), cpu_seconds_of_others()
        return time.perf_counter() - start

    def _busy_cores_of_others(self) -> float | None:
        if self._start is None or (busy := cpu_seconds_of_others()) is None:
            return None
        wall, before = self._start
        return None if before is None else round(max(0.0, busy - before) / (time.perf_counter() - wall), 2)


@dataclass(frozen=True)
class Row:
    """What one contender took in one case of a question, and its ratios to others of the same run.

    `ratios` holds this contender over each reference: the median over rounds of the quotient within a round.
    A contender that did not run has a note that says why and no figures.
    """

    question: str
    case: str
    contender: str
    unit: str
    median: float | None
    p20: float | None
    p80: float | None
    rounds: int
    ratios: dict[str, float]
    others: float | None = None
    note: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)  # "flop" and "bytes" that a call must do and move at least


def rows_not_run(question: str, case: str, notes: dict[str, str]) -> list[Row]:
    """One row per contender that did not run, with the reason."""
    return [Row(question, case, name, "", None, None, None, 0, {}, note=note) for name, note in notes.items()]


def rounds_within(seconds: float, lap: float, fewest: int = 5, most: int = 101) -> int:
    """How many rounds of `lap` seconds to run so that they take about `seconds`."""
    return max(fewest, min(most, int(seconds / lap)))


def rows_from_samples(
    question: str, case: str, laps: Laps, over: list[str], unit: str = "ms", factor: float = 1e3,
    sizes: dict[str, int] | None = None, work: dict[str, float] | None = None,
) -> list[Row]:  # fmt: skip
    """One row per contender; `factor` turns the samples into `unit`."""
    rows, samples, more = [], laps.samples, {"sizes": sizes or {}, "work": work or {}}
    for name, values in samples.items():
        ratios = {
            reference: statistics.median(v / r for v, r in zip(values, samples[reference], strict=True))
            for reference in over
            if reference in samples and reference != name
        }
        median, p20, p80 = (factor * share(values, q) for q in (0.5, 0.2, 0.8))
        rows.append(Row(question, case, name, unit, median, p20, p80, len(values), ratios, laps.others, **more))
    return rows


def rows_from_values(
    question: str, case: str, values: dict[str, float], over: list[str], unit: str, sizes: dict[str, int] | None = None
) -> list[Row]:
    """One row per contender for what is counted once, such as bytes."""
    rows = []
    for name, value in values.items():
        ratios = {
            reference: value / values[reference] for reference in over if reference in values and reference != name
        }
        rows.append(Row(question, case, name, unit, value, None, None, 1, ratios, sizes=sizes or {}))
    return rows


def share(values: list[float], q: float) -> float:
    """The q-quantile, by the nearest rank."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def assert_accurate(what: str, error: Tensor, eager_error: Tensor, bound: float = 2.0) -> None:
    """Asserts that an error is at most `bound` times, in RMS, the one that eager PyTorch makes in the same dtype."""
    found, allowed = rms(error), bound * rms(eager_error)
    assert found <= allowed, f"{what}: expected an RMS error of at most {allowed:.3e}, found {found:.3e}"


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def cpu_seconds_of_others() -> float | None:
    """CPU seconds that all processes but this one have used since boot; None where the system does not say."""
    file = Path("/proc/stat")
    if not file.exists():
        return None
    user, nice, system, _idle, _waiting, irq, softirq, steal, *_ = map(int, file.read_text().split()[1:11])
    everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everyone - sum(os.times()[:2])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch use this many threads inside a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def append_rows(file: Path, rows: list[Row], facts: dict[str, Any] | None = None) -> None:
    """Adds rows to a JSON file, in place of older rows of the same question, case and contender.

    Args:
        facts: the machine that ran them, by default this CPU.
    """
    new = [vars(row) | provenance(facts) for row in rows]
    keys = {_key(row) for row in new}
    kept = [row for row in read_rows(file) if _key(row) not in keys]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(kept + new, indent=1) + "\n")
    temporary.replace(file)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["question"], row["case"], row["contender"]


def provenance(facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a figure needs beside it to be believed."""
    return {
        "machine": facts or machine(),
        "versions": {name: _version(distribution) for name, distribution in LIBRARIES.items()},
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    """The CPU, and what of it torch uses; `load` is the average over the last minute, this process included."""
    flags = _cpuinfo("flags")
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags.split()), "none"),
        "load": round(os.getloadavg()[0], 2),
    }


def results_file(quick: bool, facts: dict[str, Any] | None = None, folder: Path = RESULTS) -> Path:
    """Where a machine's rows go, by default this CPU's; a quick run must not replace a full one."""
    facts = facts or machine()
    if "gpu" in facts:
        name = facts["gpu"]
    else:
        name = f"cpu {facts['cpu']} {facts['bf16'] if facts['bf16'] != 'none' else facts['capability']}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{slug}{'-quick' if quick else ''}.json"


def commit() -> str:
    """The commit of the working tree, marked where a package differs from it; a hash of the sources without git."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head == "unknown":
        return f"sources-{sources_hash()}"
    return head + ("-dirty" if _git("status", "--porcelain", "--", "fastlora", "kernels") else "")


@functools.cache
def sources_hash() -> str:
    """Of every Python file of the packages: the same for the same code, whatever its folder is called."""
    digest = hashlib.sha256()
    for file in sorted(file for package in ("fastlora", "kernels") for file in (ROOT / package).rglob("*.py")):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # Run from its sources, this library is there without being installed.
        ours = distribution == LIBRARIES["fastlora"]
        return importlib.import_module("fastlora").__version__ if ours else "not installed"


def _cpuinfo(name: str) -> str:
    """A field of the first processor in /proc/cpuinfo, empty where there is none."""
    file = Path("/proc/cpuinfo")
    match = re.search(rf"^{name}\s*:\s*(.*)$", file.read_text(), re.MULTILINE) if file.exists() else None
    return match[1].strip() if match else ""
