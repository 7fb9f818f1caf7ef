"""Side-by-side timing: every contender once a round, in turn, so that a drift of the machine hits all of them alike.

A measurement becomes rows, one per contender, and each row carries its ratios to other contenders of the same run
together with the machine, the versions, the commit and the date. Rows are written as soon as they exist.
"""

from __future__ import annotations

import gc
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
    "torch": "torch", "transformers": "transformers", "peft": "peft", "bitsandbytes": "bitsandbytes",
    "fastlora": "fastlora-triton",
}  # fmt: skip


@dataclass
class Laps:
    """Contenders that run once each per call, in order, timed one by one in seconds.

    `others` is how many cores other processes kept busy meanwhile: above a tenth or so, times and ratios are in doubt.
    """

    contenders: dict[str, Callable[[], Any]]
    samples: dict[str, list[float]] = field(default_factory=dict)
    others: float | None = None
    _start: tuple[float, float | None] | None = None

    def __call__(self) -> None:
        # The collector would charge one contender for the garbage of another.
        gc.disable()
        for name, contender in self.contenders.items():
            start = time.perf_counter()
            contender()
            self.samples.setdefault(name, []).append(time.perf_counter() - start)
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
    """

    question: str
    case: str
    contender: str
    unit: str
    median: float
    p20: float | None
    p80: float | None
    rounds: int
    ratios: dict[str, float]
    others: float | None = None


def rounds_within(seconds: float, lap: float, fewest: int = 5, most: int = 101) -> int:
    """How many rounds of `lap` seconds to run so that they take about `seconds`."""
    return max(fewest, min(most, int(seconds / lap)))


def rows_from_samples(
    question: str, case: str, laps: Laps, over: list[str], unit: str = "ms", factor: float = 1e3
) -> list[Row]:
    """One row per contender; `factor` turns the samples into `unit`."""
    rows, samples = [], laps.samples
    for name, values in samples.items():
        ratios = {
            reference: statistics.median(v / r for v, r in zip(values, samples[reference], strict=True))
            for reference in over
            if reference in samples and reference != name
        }
        median, p20, p80 = (factor * share(values, q) for q in (0.5, 0.2, 0.8))
        rows.append(Row(question, case, name, unit, median, p20, p80, len(values), ratios, laps.others))
    return rows


def rows_from_values(question: str, case: str, values: dict[str, float], over: list[str], unit: str) -> list[Row]:
    """One row per contender for what is counted once, such as bytes."""
    return [
        Row(question, case, name, unit, value, None, None, 1, {r: value / values[r] for r in over if r != name})
        for name, value in values.items()
    ]


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


def append_rows(file: Path, rows: list[Row]) -> None:
    """Adds rows to a JSON file, in place of older rows of the same question, case and contender."""
    new = [vars(row) | provenance() for row in rows]
    keys = {_key(row) for row in new}
    kept = [row for row in read_rows(file) if _key(row) not in keys]
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(kept + new, indent=1) + "\n")
    temporary.replace(file)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.exists() else []


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["question"], row["case"], row["contender"]


def provenance() -> dict[str, Any]:
    """What a figure needs beside it to be believed."""
    return {
        "machine": machine(),
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


def results_file(quick: bool) -> Path:
    """Where this machine's rows go; a quick run must not replace a full one."""
    facts = machine()
    kind = facts["bf16"] if facts["bf16"] != "none" else facts["capability"]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['cpu']} {kind}".lower()).strip("-")
    return RESULTS / f"cpu-{slug}{'-quick' if quick else ''}.json"


def commit() -> str:
    """The commit of the working tree, marked where a package differs from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + ("-dirty" if _git("status", "--porcelain", "--", "fastlora", "kernels") else "")


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else "unknown"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpuinfo(name: str) -> str:
    """A field of the first processor in /proc/cpuinfo, empty where there is none."""
    file = Path("/proc/cpuinfo")
    match = re.search(rf"^{name}\s*:\s*(.*)$", file.read_text(), re.MULTILINE) if file.exists() else None
    return match[1].strip() if match else ""
