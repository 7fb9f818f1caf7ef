"""Tuning without a GPU: which plans are candidates, which of them the compiler refuses, and what enters the table."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tune
from rng_variants import VARIANTS
from tune_sizes import SideSize, Size

from fastlora_kernels.gpu import tables
from fastlora_kernels.gpu.plan import Plan
from fastlora_kernels.gpu.tiles import SIDE_OPS, Tile

ROOT = Path(__file__).parent.parent


def test_candidates_of_every_size():
    for group in tune.groups():
        assert len({(size.op, size.int8, size.p, size.N, size.K, size.R) for size in group}) == 1
        for size in group:
            plans = size.plans(90)
            kinds = {plan.kind for plan in plans}
            assert len(plans) == len(set(plans)) > 1
            assert kinds <= set(tables.KINDS)
            assert tables.parse(
                tables.dump(tables.Table("", 90, True, {}, None, (tune.row_of(size, plans[0], 1.0),))), ""
            )


@pytest.mark.parametrize("op", SIDE_OPS)
def test_kernels_beside_the_product_are_held_to_eager(op, device):
    """With the sum shared by several programs and not, over several ragged tiles."""
    size = SideSize(op, 0.25, *((540, 130) if "reduce" in op else (40, 1030)), R=6)
    operands = size.operands(device)
    expected = tune.exact_and_bounds(size, operands)
    for splits in (1, 40):
        tile = Tile(32, 128 if "reduce" in op else 0, 0 if "reduce" in op else 64, 4, 2, splits=splits)
        results = size.run(Plan(op, tile, ""), **operands)
        assert not tune.error_of(results, expected)
        wrong = tuple(1.1 * result for result in results)
        assert tune.error_of(wrong, expected)


class FakeClock:
    """Gives laps made-up times, in turn."""

    def __init__(self, *seconds: float) -> None:
        self.times = itertools.cycle(seconds)

    def __call__(self, lap) -> float:
        return next(self.times)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_the_fastest_plan_that_is_right_enters(op, monkeypatch, device):
    size = Size(op, True, 0.0, 37, 40, 64, 4)
    tile = Tile(16, 16, 16, 4, 2)
    plans = [Plan(kind, tile, "") for kind in ("cublas", "two_pass", "scratch")]
    right, said = Size.run, []

    def run(self, plan, **inputs):
        if plan.kind == "scratch":
            raise RuntimeError("out of resources")
        results = right(self, plan, **inputs)
        return (results[0] + (plan.kind == "cublas"), *results[1:]) if "wrong" in plan.why else results

    monkeypatch.setattr(Size, "run", run)
    monkeypatch.setattr(tune, "ROUNDS", 3)
    wrong = Plan("cublas", tile, "wrong")
    row = tune.fastest(size, [*plans, wrong], device, FakeClock(3.0, 2.0), said.append)
    assert (row.kind, row.microseconds, row.M, row.max_rank, row.dropout) == ("two_pass", 2e6, 37, 4, False)
    assert [line for line in said if "out of resources" in line]
    assert tune.fastest(size, [wrong], device, FakeClock(1.0), said.append) is None
    assert "RMS error" in said[-1]


def test_a_group_enters_whole_or_not_at_all(tmp_path, monkeypatch):
    properties = SimpleNamespace(name="Made-up GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(tune, "DeviceClock", FakeClock)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(tune, "ask", lambda group, *_: [(size, []) for size in group])
    now = {"seconds": 0.0}
    monkeypatch.setattr(tune.time, "monotonic", lambda: now["seconds"])

    def fastest(size, *_):
        now["seconds"] += 1
        return tune.row_of(size, Plan("cublas", Tile(16, 16, 16, 4, 2), ""), 1.0)

    monkeypatch.setattr(tune, "fastest", fastest)
    first, second, *_ = tune.groups()
    file = tmp_path / tune.file_name("Made-up GPU")
    tune.tune(file, len(first) + len(second) - 0.5, print)
    assert file.name == "made-up-gpu.json"
    table = tables.parse(json.loads(file.read_text()), file.name)
    assert (table.gpu, table.arch, table.measured) == ("Made-up GPU", 90, True)
    assert [row.M for row in table.rows] == [size.M for size in first]


ASKED = """
import sys
from fastlora_kernels.gpu.plan import Plan
from fastlora_kernels.gpu.tiles import Tile
from rng_variants import VARIANTS, meta_launch
from tune_sizes import Size, refusal, refused
size = Size("forward", False, 0.0, 512, 4096, 4096, 16)
for tile in (Tile(64, 64, 64, 4, 3), Tile(128, 128, 128, 8, 8)):
    print("refused" if refusal(Plan("fused", tile, ""), size, 90) else "accepted")
for variant in VARIANTS:
    print(refused([meta_launch(variant)], 90) or "accepted")
"""


def test_the_compiler_decides():
    """A tile that fits, one that needs more shared memory than there is, and every generator of a mask, on sm_90."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "bench")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["accepted", "refused", *["accepted"] * len(VARIANTS)]
