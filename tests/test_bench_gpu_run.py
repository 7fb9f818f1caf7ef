"""The run that measures everything on a machine with a GPU: its stages, its time limits and what it leaves behind."""

import json
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu_compile
import gpu_run
import gpu_sanitizer
import pytest
import torch
from gpu_run import Stage

from fastlora_kernels.gpu.aot import WEIGHT_KERNELS, specialisation
from fastlora_kernels.gpu.launch import Launch, device_arch
from fastlora_kernels.gpu.tiles import SIDE_OPS

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
            stage("fine", "print('first words')", 4),
            stage("wrong", "raise SystemExit(3)", 4),
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


def test_time_that_is_not_needed_is_for_later_stages(tmp_path, impatient):
    stages = [stage("short", "pass", 6), stage("longer", "import time; time.sleep(4); print('whole')", 2)]
    result = gpu_run.run(stages, tmp_path, 60)
    assert [(o.ended, o.last) for o in result.stages][1] == ("done", "whole")


BREAKS = """
import os, sys
begun = os.environ["FASTLORA_STAGE_BEGUN"]
turn = len(open(begun).read()) if os.path.exists(begun) else 0
open(begun, "a").write("x")
print("turn", turn, float(os.environ["FASTLORA_STAGE_UNTIL"]) > 0)
sys.exit({codes}[turn])
"""


@pytest.mark.parametrize(
    ("codes", "ended", "last"), [([75, 75, 0], "done", "turn 2 True"), ([75, 1], "failed", "turn 1 True")]
)
def test_a_stage_that_breaks_the_gpu_goes_on(tmp_path, codes, ended, last):
    (outcome,) = gpu_run.run([stage("breaks", BREAKS.format(codes=codes))], tmp_path, 60).stages
    assert (outcome.ended, outcome.last, outcome.restarts) == (ended, last, len(codes) - 1)


TESTS = """
import gpu_stage, pytest
broken = []
gpu_stage.gpu_is_broken = lambda: bool(broken)
def test_first(): pass
def test_breaks():
    broken.append(1)
    assert False, "illegal memory access"
def test_after(): pass
"""


def test_tests_go_on_after_the_one_that_broke_the_gpu(tmp_path):
    """And past the time of the stage none begins."""
    (tmp_path / "test_some.py").write_text(TESTS)
    site = gpu_run.environment_for(tmp_path) | {"FASTLORA_STAGE_BEGUN": str(tmp_path / "begun")}
    plugins = "-p no:cacheprovider -p gpu_stage -p no:xdist"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", *plugins.split()]

    def run(until: float) -> subprocess.CompletedProcess:
        variables = site | {"FASTLORA_STAGE_UNTIL": str(until)}
        return subprocess.run([*command, "test_some.py"], cwd=tmp_path, env=variables, capture_output=True, text=True)

    first, second = run(time.time() + 60), run(time.time() + 60)
    assert (first.returncode, second.returncode) == (75, 0)
    assert "test_breaks broke the GPU for this process" in first.stdout
    assert "1 passed, 2 skipped" in second.stdout
    (tmp_path / "begun").unlink()
    assert "3 skipped" in (late := run(time.time() - 1).stdout)
    assert "the time of the stage was over" in late


SUMMARIES = {
    "clean": (0, "========= ERROR SUMMARY: 0 errors", "memcheck: clean, ERROR SUMMARY: 0 errors"),
    "found": (
        86,
        "========= Invalid write\n========= ERROR SUMMARY: 3 errors",
        "memcheck: FOUND ERROR SUMMARY: 3 errors",
    ),
    "refused": (255, "========= Error: Device not supported", "memcheck: does not work on this machine, Error: Device"),
    "slow": (None, "", "memcheck: not over in time"),
}


@pytest.mark.parametrize(("code", "output", "words"), SUMMARIES.values(), ids=SUMMARIES.keys())
def test_what_the_memory_checks_say(code, output, words):
    assert gpu_sanitizer.verdict("memcheck", code, output).startswith(words)


def test_without_the_tool_that_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_sanitizer.shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["gpu_sanitizer.py"])
    gpu_sanitizer.main()
    assert capsys.readouterr().out == "not run: compute-sanitizer is not installed\n"


def test_what_is_checked_is_every_kernel(device, monkeypatch):
    """Launched as compiled before: on tensors without memory, so that nothing compiles under the tool."""
    made, record = [], Launch.run

    def run(launch: Launch, where: torch.device) -> None:
        record(launch, where) if where.type == "meta" else made.append(launch)

    monkeypatch.setattr(Launch, "run", run)
    kernels = set()
    for size, plan in gpu_sanitizer.cases():
        operands, arch = size.operands(device), device_arch(torch.device(device))
        made.clear()
        size.run(plan, **operands)
        ran = {specialisation(launch) for launch in made}
        assert ran == {specialisation(launch) for launch in size.launches(plan, arch)}, (size, plan)
        kernels |= {name for name, *_ in ran}
    assert {f"_{name}_kernel" for name in (*SIDE_OPS, *WEIGHT_KERNELS, "dense_copy")} <= kernels
    made.clear()
    gpu_sanitizer.mixed(device)
    ahead = {specialisation(launch) for launch in gpu_sanitizer.mixed_launches(arch)}
    assert {specialisation(launch) for launch in made if "quantize" not in launch.kernel.__name__} == ahead


def test_what_is_compiled_ahead(monkeypatch):
    """What the first figures and the target table launch comes before the candidates of the tuning."""
    found = list(gpu_compile.new_jobs(90, "NVIDIA H200"))
    kinds = [type(size).__name__ + plan.kind for (size, plan), _ in found]
    assert kinds[0] == "Sizetwo_pass"
    assert {"Sizedecode", "Sizefused", "Sizescratch", "SideSizeshrink", "SideSizegroup_shrink"} <= set(kinds)
    assert sum(variants for _, variants in found[:60]) < 200, "more than 16 cores compile in a quarter of a minute"


def test_the_summary_is_there_while_a_stage_runs(tmp_path, impatient):
    look = f"import json; print([s['name'] for s in json.load(open({str(tmp_path / 'run.json')!r}))['stages']])"
    gpu_run.run([stage("one", "pass"), stage("two", look, output="seen.txt")], tmp_path, 30)
    assert (tmp_path / "seen.txt").read_text() == "['one']\n"


def test_what_a_stage_started_ends_with_it(tmp_path, impatient):
    """A stage that leaves a process behind, and one that is stopped while a child works."""
    ticks = tmp_path / "ticks"
    child = f"import time\nwhile True: open({str(ticks)!r}, 'a').write('.'); time.sleep(0.05)"
    spawn = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep({{}})"
    gpu_run.run([stage("leaves", spawn.format(1), 4), stage("stopped", spawn.format(60), 2)], tmp_path / "out", 30)
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
    assert names[:5] == ["compiling", "first figures", "correctness", "tuning", "target table"]
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
