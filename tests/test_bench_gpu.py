"""The GPU benchmarks without a GPU: every contender once at tiny sizes, their timing against a clock that is not real,
and the tables and plots on rows that are made up here and nowhere else."""

import importlib
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_models
import gpu_plots
import harness
import pytest
import report
import roofline
import torch
from gpu_layers import Place
from rng_variants import masked_shrink
from targets import GPU_TARGETS, target_of

from fastlora_kernels import reference

ROOT = Path(__file__).parent.parent


def test_every_contender_runs_and_is_accurate():
    command = [sys.executable, "-m", "pytest", "bench", "-m", "gpu", "--tiny", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_first_figures_run(tmp_path):
    command = [sys.executable, "bench/first_figures.py", str(tmp_path / "figures.json"), "--tiny"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not (tmp_path / "figures.json").exists()  # nothing was timed, so there is nothing to keep


class FakeDevice:
    """A GPU whose time passes where a test says so, and whose events read it."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, []

    def works(self, seconds: float, name: str = "work"):
        def call() -> None:
            self.now += seconds
            self.log.append(name)

        return call

    def event(self):
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def clock(self, launch_bound: bool = False) -> gpu.DeviceClock:
        return gpu.DeviceClock(launch_bound, self.event, self.works(100.0, "flush"), self.works(10.0, "wait"))


@pytest.mark.parametrize("launch_bound", [False, True])
def test_a_sample_is_the_time_per_call_of_a_lap_alone(launch_bound):
    device = FakeDevice()
    lap = gpu.Lap([device.works(1.0), device.works(3.0)])
    assert device.clock(launch_bound)(lap) == 2.0
    assert device.log == ["flush", *(["wait"] if launch_bound else []), "work", "work"]


def test_a_gpu_is_kept_busy_for_as_long_as_queueing_takes():
    device = FakeDevice()
    lap, clock = gpu.Lap([lambda: time.sleep(2e-3)]), device.clock()
    for _ in range(2):
        clock(lap)
    first, second = 1, device.log.count("flush") - 1
    assert second >= 1.5 * 2e-3 / gpu.FLUSH_SECONDS > 10 * first
    clock.queued[id(lap)] = 1e3
    device.log.clear()
    clock(lap)
    assert device.log.count("flush") == gpu.MOST_FLUSHES


def test_contenders_take_turns_and_ratios_are_within_a_round():
    device = FakeDevice()
    drift = itertools.count(1)  # the device slows down; the ratio does not see it
    pace = {"value": 1}

    def ours() -> None:
        pace["value"] = next(drift)
        device.works(1.0 * pace["value"], "ours")()

    theirs = lambda: device.works(2.0 * pace["value"], "theirs")()  # noqa: E731
    laps = harness.Laps({"ours": gpu.Lap([ours]), "theirs": gpu.Lap([theirs])}, device.clock())
    for _ in range(5):
        laps()
    assert [name for name in device.log if name != "flush"] == ["ours", "theirs"] * 5
    ours_row, theirs_row = harness.rows_from_samples("q", "c", laps, ["ours"], "us", 1e6, {"M": 3}, {"flop": 1.0})
    assert ours_row.median == 3e6
    assert (ours_row.p20, ours_row.p80) == (2e6, 5e6)
    assert theirs_row.ratios == {"ours": 2.0}
    assert theirs_row.sizes == {"M": 3}
    assert theirs_row.rounds == 5


def absent():
    raise gpu.NotInstalledError("No module named 'peer'")


def broken():
    raise RuntimeError("no kernel image\nfor this device")


def test_what_cannot_run_is_a_row_with_the_reason():
    builders = {"ours": lambda: [lambda: None], "absent": absent, "broken": broken}
    ready, notes = gpu.prepare(builders, graphed=False, strict=False)
    assert list(ready) == ["ours"]
    assert notes == {
        "absent": "not installed: No module named 'peer'", "broken": "failed: RuntimeError: no kernel image",
    }  # fmt: skip
    rows = harness.rows_not_run("q", "c", notes)
    assert [row.median for row in rows] == [None, None]
    assert gpu.failures(notes) == []
    ready, notes = gpu.prepare(
        {"fastlora bf16": broken, "fastlora int8": absent, "peer": lambda: [lambda: None]}, graphed=False, strict=False
    )
    assert list(ready) == ["peer"], "what of ours fails does not take the peers' rows along"
    assert gpu.failures(notes) == ["fastlora bf16 failed: RuntimeError: no kernel image"]
    with pytest.raises(RuntimeError):
        gpu.prepare({"peer": broken}, graphed=False, strict=True)


def test_inputs_rotate_through_more_than_the_cache(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))
    for size in (1 << 10, 8 << 20, 100 << 20):
        count = gpu.copies(size, "cuda")
        assert count == gpu.MOST_COPIES or count * size >= 3 * (50 << 20)
        assert count >= 2


MACHINE = {"gpu": "Made-up GPU", "capability": "sm_90"}


def made_up(question, contender, median, ratios=None, case="made up", unit="us", note="", **more):
    row = harness.Row(question, case, contender, unit, median, median, median, 5, ratios or {}, note=note, **more)
    return vars(row) | {"machine": MACHINE, "versions": {"torch": "0"}, "commit": "0", "date": "2000-01-01"}


ROWS = [
    made_up("linear by tokens", "fastlora int8", 10.0, sizes={"M": 16}, work={"flop": 1e9, "bytes": 1e7}),
    made_up("linear by tokens", "fastlora int8", 20.0, sizes={"M": 64}, work={"flop": 4e9, "bytes": 1e7}),
    made_up("linear by tokens", "frozen, cuBLAS", 15.0, sizes={"M": 64}, work={"flop": 4e9, "bytes": 1e7}),
    made_up("merge", "copy of as many bytes", 5.0, work={"flop": 1e6, "bytes": 1e7}),
    made_up("merge", "fastlora", 6.0, {"copy of as many bytes": 1.2}, work={"flop": 1e6, "bytes": 1e7}),
    made_up("bytes for backward, GPU", "fastlora bf16", 660.0, {"PEFT bf16": 0.4},
            "linears and activation, 8192 tokens", "MiB", sizes={"M": 8192}),
    made_up("merge", "peer", None, note="not installed: peer"),
]  # fmt: skip


def test_table_and_plots(tmp_path, monkeypatch, capsys):
    file = tmp_path / "made-up-gpu.json"
    file.write_text(json.dumps(ROWS))
    first = made_up("1: made up", "our kernel", 100.0, work={"flop": 7.77e10, "bytes": 1e6})
    (tmp_path / "first-figures.json").write_text(json.dumps([first]))
    monkeypatch.setattr(report, "gpu_machine", lambda: MACHINE)
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", "--results", str(tmp_path)])
    report.main()
    printed = capsys.readouterr().out
    for words in ("777 TFLOP/s", "not installed: peer", "1.200", "2.00 TB/s", "<= 1.429", "<= 700", "Made-up GPU"):
        assert words in printed, words
    merge = next(line for line in printed.splitlines() if "fastlora" in line and "merge" in line)
    assert re.search(r"1\.2 .* <= 1\.429 .* <= 1\.176 .* reach .* 0 TFLOP/s, 1\.67 TB/s .* 83%", merge), merge
    assert printed.count("not measured") == len(GPU_TARGETS) - 2
    assert file.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_without_results_every_target_is_not_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "cpu-some.json").write_text("[]")
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["report.py", "--gpu", "--results", str(tmp_path)])
    report.main()
    printed = capsys.readouterr().out
    assert printed.count("not measured") == len(GPU_TARGETS) + 1
    for target in GPU_TARGETS:
        assert f"<= {target.reach:.4g}" in printed


def test_a_share_of_the_roofline_is_that_of_the_nearer_limit():
    most = roofline.ceilings(ROWS)
    assert (round(most.tflops, 1), most.terabytes) == (266.7, 2.0)
    slow = {"question": "q", "median": 30.0, "unit": "us", "work": {"flop": 4e9, "bytes": 1e6}}
    assert roofline.share(slow, most) == pytest.approx(0.5)
    assert roofline.share(slow | {"work": {"flop": 1.0, "bytes": 6e6}}, most) == pytest.approx(0.1)
    assert roofline.ceilings([row for row in ROWS if row["contender"] != roofline.COPY]) is None


def test_contenders_have_the_same_adapters():
    """An int8 model has scales among its parameters, and PEFT's other names; the values are the same all the same."""

    def make():
        return gpu_models.SevenLinears(Place("cpu", tiny=True))

    drawn = [
        [p for name, p in gpu_models.made(make, adapt, Place("cpu", tiny=True)).named_parameters() if "lora_" in name]
        for adapt in (gpu_models.ours, gpu_models.ours_int8, gpu_models.peft_model, gpu_models.peft_fp32)
    ]
    for same in zip(*drawn, strict=True):
        assert all(torch.equal(one.bfloat16(), same[0].bfloat16()) for one in same)
    assert not torch.equal(drawn[0][0], drawn[0][2][:, : drawn[0][0].shape[1]])


def test_plots_without_rows_that_they_are_for(tmp_path):
    gpu_plots.draw([made_up("decode", "peer", None, note="not installed")], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").exists()


def test_every_target_of_a_linear_is_that_of_a_row():
    """The cases are those that the benchmarks name at their real sizes."""
    found = set()

    def race(question, case, builders, over, **_):
        for contender in builders:
            row = {"question": question, "case": case, "contender": contender}
            found.update(id(target) for other in [*over, None] if (target := target_of(row, other)))

    place = Place("cpu", tiny=False)
    for name, arguments in {"linear": [(8192, 4096, 4096), (8192, 4096, 14336)], "int8": [(4096,), (14336,)]}.items():
        module = importlib.import_module(f"test_gpu_{name}")
        module.check_linear = lambda *_, **__: None  # at these sizes a CPU would take minutes
        for sizes in arguments:
            module.test_forward_and_backward(race, place, *sizes)
            if name == "linear":
                module.test_forward(race, place, *sizes)
    decode = importlib.import_module("test_gpu_decode")
    decode.check_linear = lambda *_, **__: None
    for N, launched in itertools.product((4096, 14336), ("as a CUDA graph", "by Python")):
        decode.test_decode(race, place, N, launched)
    questions = ("linear, ", "int8, ", "decode")
    expected = {id(t) for t in GPU_TARGETS if t.question.startswith(questions)}
    assert found == expected


@pytest.mark.parametrize("variant", ["none", "hash", "rand", "randint4x, 10 rounds", "16-bit lanes, 7 rounds"])
def test_generators_of_the_shrink(variant, device):
    """The hash is the kernels' mask; of the others the share of kept elements is that of 2048 fair draws."""
    p, seed = 0.5, torch.tensor([987654321], device=device)
    a = torch.eye(16, 64, device=device)
    kept = masked_shrink(torch.ones(128, 64, device=device), a, p, seed, variant, block_m=64)
    if variant == "none":
        assert (kept == 1).all()
        return
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    if variant == "hash":
        assert torch.equal(kept == 2, reference.dropout_mask(seed, 128, 64, p)[:, :16])
    share = (kept == 2).double().mean().item()
    assert abs(share - 0.5) < 5 * 0.5 / kept.numel() ** 0.5
