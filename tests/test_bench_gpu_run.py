"""The run that measures everything on a machine with a GPU: its stages, its time limits and what it leaves behind."""

import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu_run
import pytest
import torch
from gpu_run import Stage

ROOT = Path(__file__).parent.parent


def stage(name: str, code: str, limit: float = 30, **options) -> Stage:
    return Stage(name, [sys.executable, "-c", code], limit, **options)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(gpu_run, "PATIENCE", 1)


def test_stages_end_in_their_own_time(tmp_path, impatient):
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    out = tmp_path / "out"
    slow = f"open('{out}/slow.json', 'w').write('1'); open('{out}/x.partial', 'w'); import time; time.sleep(60)"
    start = time.monotonic()
    result = gpu_run.run(
        [
            stage("fine", "print('first words')"),
            stage("wrong", "raise SystemExit(3)"),
            stage("slow", slow, 3),
            stage("deaf", stubborn, 3),
            stage("report", "print('a table')", output="report.txt"),
        ],
        out, 60,
    )  # fmt: skip
    assert time.monotonic() - start < 30
    assert [o.ended for o in result.stages] == ["done", "failed", "stopped", "stopped", "done"]
    assert result.stages[1].code == 3
    assert json.loads((out / "run.json").read_text())["stages"][4]["name"] == "report"
    assert (out / "report.txt").read_text() == "a table\n"
    log = (out / "log.txt").read_text()
    assert log.index("first words") < log.index("==== wrong") < log.index("deaf\n")
    assert (out / "slow.json").read_text() == "1"  # what a stage has written is not lost with it
    assert sorted(file.name for file in out.iterdir()) == ["log.txt", "report.txt", "run.json", "slow.json"]


def test_the_whole_ends_in_time(tmp_path, impatient):
    start = time.monotonic()
    result = gpu_run.run([stage("long", "import time; time.sleep(60)"), stage("never", "print(1)")], tmp_path, 4)
    assert time.monotonic() - start < 10
    assert [o.ended for o in result.stages] == ["stopped", "no time left"]


def test_the_summary_is_there_while_a_stage_runs(tmp_path, impatient):
    look = f"import json; print([s['name'] for s in json.load(open({str(tmp_path / 'run.json')!r}))['stages']])"
    gpu_run.run([stage("one", "pass"), stage("two", look, output="seen.txt")], tmp_path, 30)
    assert (tmp_path / "seen.txt").read_text() == "['one']\n"


def test_what_a_stage_started_ends_with_it(tmp_path, impatient):
    """A stage that leaves a process behind, and one that is stopped while a child works."""
    ticks = tmp_path / "ticks"
    child = f"import time\nwhile True: open({str(ticks)!r}, 'a').write('.'); time.sleep(0.05)"
    spawn = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep({{}})"
    gpu_run.run([stage("leaves", spawn.format(1)), stage("stopped", spawn.format(60), 2)], tmp_path / "out", 30)
    size = ticks.stat().st_size
    time.sleep(0.5)
    assert size > 0
    assert ticks.stat().st_size == size


def test_a_long_log_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "MOST_LOGGED", 1000)
    gpu_run.run([stage("talks", "print('x' * 5000); print('the end')")], tmp_path, 30)
    log = (tmp_path / "log.txt").read_text()
    assert len(log) < 1000
    assert log.endswith("the end\n")


def test_the_real_stages(tmp_path):
    stages = gpu_run.stages_for(tmp_path)
    names = [one.name for one in stages]
    assert names[:3] == ["first figures", "correctness", "target table"]
    assert sum(one.limit for one in stages) <= gpu_run.SECONDS <= 9 * 60 - 2 * gpu_run.PATIENCE
    for one in stages:
        for word in one.command[1:]:
            if re.match(r"(bench|tests)/", word):
                assert (ROOT / word).exists(), word
    files = {"run.json", *(one.output for one in stages)}
    files |= {"first-figures.json", "tests.xml", "gpu.json", "gpu.png", "tuned-gpu.json"}
    assert len(files) <= 8
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)


def test_wheels_are_unpacked_and_nothing_else_is_touched(tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    site.mkdir()
    with pytest.raises(ValueError, match="found none"):
        gpu_run.unpack(wheels, site)
    with zipfile.ZipFile(wheels / "peer-1-py3-none-any.whl", "w") as archive:
        archive.writestr("peer_of_ours.py", "NAME = 'peer'")
    gpu_run.unpack(wheels, site)
    code = "import peer_of_ours, fastlora, fastlora_kernels; print(peer_of_ours.NAME)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=gpu_run.environment_for(site), capture_output=True, text=True, check=True
    )
    assert found.stdout == "peer\n"
    with zipfile.ZipFile(wheels / "bad-1-py3-none-any.whl", "w") as archive:
        archive.writestr("../outside.py", "")
    with pytest.raises(ValueError, match=r"'\.\./outside\.py' in bad"):
        gpu_run.unpack(wheels, site)
    assert not (tmp_path / "outside.py").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU gets to read")
def test_without_a_gpu_it_says_so(tmp_path):
    result = subprocess.run(
        ["make", "gpu", f"OUT={tmp_path / 'out'}", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "a GPU, torch, triton and transformers are needed" in result.stderr
    assert not (tmp_path / "out").exists()
    assert "OUT=dir" in subprocess.run(["make", "gpu"], cwd=ROOT, capture_output=True, text=True).stdout
