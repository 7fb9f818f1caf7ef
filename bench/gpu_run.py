"""Everything that is to be measured on a machine with a GPU, in one run that ends by itself: `make gpu OUT=folder`.

Runs on the Python that starts it and installs nothing; wheels of a folder are unpacked for the run alone. What matters
most comes first, every stage has a time limit and leaves its results when it is stopped, and the whole ends in time;
what a stage does not need of its time is for those after it. The benchmarks run with the table that the tuning made.
OUT gets at most eight files: run.json (what ran, how long, how it ended), log.txt, first-figures.json, tests.xml,
GPU.json (the rows of the benchmarks), tuned-GPU.json, report.txt and GPU.png.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 520  # of nine minutes
PATIENCE = 5  # seconds between asking a stage to stop and stopping it
NOTICE = 8  # seconds before its limit at which a stage is to begin nothing more
UNTIL, BEGUN = "FASTLORA_STAGE_UNTIL", "FASTLORA_STAGE_BEGUN"  # environment variables of a stage
BROKEN_GPU = 75  # exit code of a stage that wants to be started again
LOG, SUMMARY = "log.txt", "run.json"
MOST_LOGGED = 8 << 20  # bytes of log.txt
GPU_TESTS = [
    "test_kernels_*.py", "test_group_ops.py", "test_mixed_ops.py", "test_mixed_kernels.py", "test_int8_ops.py",
    "test_dropout.py",
]  # fmt: skip
QUESTIONS = ["linear", "layers", "int8", "decode", "merge", "memory", "mixed"]  # the most important first
TEST_PROCESSES = min(16, os.cpu_count() or 1)  # compiling is most of what a test of a kernel does


@dataclass(frozen=True)
class Stage:
    """A command and how long it may take, in seconds; its output goes to a file of OUT or to the log."""

    name: str
    command: list[str]
    limit: float
    output: str = LOG


@dataclass
class Outcome:
    """How a stage ended: "done", "failed" (`code` tells), "stopped" at its limit, or "no time left" before it began.

    `last` is the last line that it printed, and `restarts` counts how often it broke the GPU and was started again.
    """

    name: str
    ended: str
    seconds: float = 0.0
    code: int | None = None
    last: str = ""
    restarts: int = 0


@dataclass
class Run:
    """What run.json holds."""

    started: str
    python: str = sys.version.split()[0]
    stages: list[Outcome] = field(default_factory=list)

    def write(self, out: Path) -> None:
        partial = out / f"{SUMMARY}.partial"
        with partial.open("w") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out / SUMMARY)


def run(stages: list[Stage], out: Path, seconds: float, environment: dict[str, str] | None = None) -> Run:
    """Runs stages in turn until `seconds` are over; run.json is up to date after each."""
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    end = start + seconds
    result = Run(datetime.now(UTC).isoformat(timespec="seconds"))
    result.write(out)
    planned = start
    for stage in stages:
        planned += stage.limit
        limit = min(planned, end - PATIENCE) - time.monotonic()
        outcome = _in_parts(stage, out, limit, environment) if limit > 1 else Outcome(stage.name, "no time left")
        result.stages.append(outcome)
        _tidy(out)
        result.write(out)
        print(f"{outcome.name}: {outcome.ended}, {outcome.seconds:.0f} s; {outcome.last}", flush=True)
    return result


def _in_parts(stage: Stage, out: Path, limit: float, environment: dict[str, str] | None) -> Outcome:
    """Runs one stage, and again from where it was each time that it breaks the GPU."""
    end, restarts, seconds = time.monotonic() + limit, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        variables = (environment or dict(os.environ)) | {BEGUN: f"{folder}/begun"}
        while True:
            left = end - time.monotonic()
            variables[UNTIL] = str(time.time() + left - min(NOTICE, left / 4))
            outcome = run_stage(stage, out, left, variables)
            seconds += outcome.seconds
            if outcome.code != BROKEN_GPU or end - time.monotonic() < NOTICE:
                return replace(outcome, seconds=round(seconds, 1), restarts=restarts)
            restarts += 1


def run_stage(stage: Stage, out: Path, limit: float, environment: dict[str, str] | None = None) -> Outcome:
    """Runs one stage, in a session of its own that ends with it."""
    start, log = time.monotonic(), out / stage.output
    with log.open("ab" if stage.output == LOG else "wb") as file:
        if stage.output == LOG:
            file.write(f"\n==== {stage.name}: {' '.join(stage.command)}\n".encode())
            file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
            ended = "done" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "stopped"
        finally:
            _stop(process)
    lines = log.read_bytes()[begin:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    _shorten(out / LOG)
    return Outcome(stage.name, ended, round(time.monotonic() - start, 1), process.returncode, last[:300])


def _stop(process: subprocess.Popen) -> None:
    """Ends a stage and whatever it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)


def _shorten(log: Path) -> None:
    """Keeps the end of a log that has become long."""
    if log.exists() and log.stat().st_size > MOST_LOGGED:
        log.write_bytes(b"(the beginning was cut)\n" + log.read_bytes()[-MOST_LOGGED // 2 :])


def _tidy(out: Path) -> None:
    """Removes what a stage was writing when it was stopped; the file that it was to replace is whole."""
    for file in [*out.glob("*.partial"), *out.glob("*.json.[0-9]*")]:
        file.unlink()


def stages_for(out: Path, python: str = sys.executable) -> list[Stage]:
    """What to run, the most important first; together within `SECONDS`."""
    out = out.resolve()
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_stage"]
    questions = [*(f"bench/test_gpu_{name}.py" for name in QUESTIONS), "bench/test_int8_error.py"]
    bench = [*pytest, *questions, "--benchmark-quiet", "--results", str(out)]
    files = sorted(file for name in GPU_TESTS for file in (ROOT / "tests").glob(name))
    tests = [*pytest, *(f"tests/{file.name}" for file in files), "-k", "not cpu", "-vv", f"--junit-xml={out}/tests.xml"]
    if importlib.util.find_spec("xdist"):
        tests += ["--numprocesses", str(TEST_PROCESSES)]
    report = Stage("report", [python, "bench/report.py", "--gpu", "--results", str(out)], 12, "report.txt")
    return [
        Stage("compiling", [python, "bench/gpu_compile.py"], 45),
        Stage("first figures", [python, "bench/first_figures.py", f"{out}/first-figures.json"], 70),
        Stage("correctness", tests, 100),
        Stage("tuning", [python, "bench/tune.py", "--results", str(out)], 72),
        Stage("target table", [*bench, "-m", "gpu and not full"], 128),
        report,
        Stage("memory checks", [python, "bench/gpu_sanitizer.py"], 45),
        Stage("sweeps", [*bench, "-m", "gpu and full"], 34),
        report,
    ]


def unpack(wheels: Path, folder: Path) -> None:
    """Unpacks wheels to where Python finds them.

    Raises:
        ValueError: there is no wheel, or one has a file that would land elsewhere.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise ValueError(f"wheels: expected a folder of .whl files, found none in {wheels}")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"wheels: expected files within the wheel, found {name!r} in {wheel.name}")
            archive.extractall(folder)


def environment_for(site: Path) -> dict[str, str]:
    """The packages of this repository and of the wheels before those of the machine."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench"), str(site), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | changes | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}


def check_gpu(environment: dict[str, str]) -> str:
    """The GPU's name; ends the program where there is none or what is needed cannot be imported."""
    code = "import torch, triton, transformers; print(torch.cuda.get_device_name(0))"
    found: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if found.returncode:
        raise SystemExit(f"a GPU, torch, triton and transformers are needed: {found.stderr.strip().splitlines()[-1]}")
    return found.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the run may use")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="when to have ended")
    options = parser.parse_args()
    start, site = time.monotonic(), Path(tempfile.mkdtemp(prefix="fastlora-gpu-"))
    try:
        if options.wheels:
            unpack(options.wheels, site)
        environment = environment_for(site) | {"FASTLORA_TABLES": str(options.out.resolve())}
        print(f"measuring on {check_gpu(environment)}, results in {options.out}", flush=True)
        result = run(stages_for(options.out), options.out, options.seconds - (time.monotonic() - start), environment)
    finally:
        shutil.rmtree(site, ignore_errors=True)
    sys.exit(any(outcome.ended in ("failed", "no time left") for outcome in result.stages))


if __name__ == "__main__":
    main()
