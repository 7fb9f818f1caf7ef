"""Which plan is chosen for what, from which table, and what it costs."""

import functools
import json
import logging
import sys
from dataclasses import replace

import pytest
import torch
from accuracy import compare
from inputs import backward_inputs, linear_inputs

from fastlora_kernels import gpu, reference
from fastlora_kernels.gpu import partial, scratch, tables
from fastlora_kernels.gpu import plan as plan_module
from fastlora_kernels.gpu.candidates import candidates, side_candidates
from fastlora_kernels.gpu.cost import cost
from fastlora_kernels.gpu.launch import Launch
from fastlora_kernels.gpu.lora_linear import planned_forward
from fastlora_kernels.gpu.lora_linear_backward import planned_backward
from fastlora_kernels.gpu.plan import Plan, choose_plan, safe_plan, side_tile
from fastlora_kernels.gpu.tiles import MULTIPROCESSORS, SIDE_OPS, SPAN, Tile, side_tile_by_rule, spread

HOPPER, BF16, L2_BYTES = 90, torch.bfloat16, 50e6
SMALL = Tile(16, 32, 32, 4, 2)


@pytest.fixture(autouse=True)
def _rules_alone(monkeypatch):
    """What was measured and shipped for some GPU has no part in these tests."""
    rules = tuple(table for table in tables.shipped() if not table.measured)
    monkeypatch.setattr(tables, "shipped", functools.cache(lambda: rules))
    for choice in (choose_plan, side_tile):
        choice.cache_clear()
    yield
    for choice in (choose_plan, side_tile):
        choice.cache_clear()


def chosen(M, R=16, int8=True, p=0.0, op="forward", arch=HOPPER, dtype=BF16):
    return choose_plan(arch, dtype, M, 4096, 4096, R, int8, p, op)


def test_hopper_table_switches_where_it_says():
    kinds = {M: chosen(M).kind for M in (1, 16, 17, 512, 1023, 1025, 8192)}
    assert kinds == {
        1: "decode", 16: "decode", 17: "fused", 512: "fused", 1023: "fused", 1025: "scratch", 8192: "scratch",
    }  # fmt: skip
    assert chosen(512, p=0.1).kind == "two_pass", "dropout in the product's loop costs more than a launch"
    assert (chosen(512, R=64).kind, chosen(512, R=65).kind) == ("fused", "two_pass")
    assert (chosen(8192, int8=False).kind, chosen(8192, int8=False, R=0).kind) == ("two_pass", "cublas")
    assert [chosen(M, op="backward").kind for M in (1, 512, 8192)] == ["two_pass", "two_pass", "scratch"]
    assert chosen(512).why == "rule for sm_90, not measured"
    assert chosen(512, dtype=torch.float16) == chosen(512)


def test_unknown_gpus_get_a_safe_plan_and_one_log_line(caplog):
    plan_module._say_unknown.cache_clear()
    choose_plan.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastlora.kernels"):
        for M in (1, 100, 5000):
            found = chosen(M, arch=103)
            assert found == safe_plan(103, BF16, M, 4096, 4096, 16, True, 0.0, "forward")
            assert not found.tile.tma
    assert [record.message for record in caplog.records] == ["no plans were tuned for sm_103: safe ones are used"]


@pytest.mark.parametrize("M", [16, 17, 1024, 1025])
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_both_sides_of_every_switch_of_the_safe_plan(device, M, int8):
    inputs = linear_inputs((M, 32, 24, 4), BF16, device, int8=int8)
    compare(gpu.lora_linear, reference.lora_linear, inputs)
    if M > 1000:
        gradients = backward_inputs((M, 32, 24, 4), BF16, device, int8=int8)
        compare(gpu.lora_linear_backward, reference.lora_linear_backward, gradients)


@pytest.mark.parametrize("N", [4096, 14336])
def test_large_products_move_what_is_ideal(N):
    """Beyond the product itself: x once in the forward, d_y and x once in the backward (bf16, dropout on)."""
    M, K, R = 8192, 4096, 16
    size = HOPPER, BF16, M, N, K, R, False, 0.05
    product = 2 * (M * K + M * N + N * K)
    forward = cost(choose_plan(*size), *size)
    assert forward.launches == 2
    assert forward.bytes - product == pytest.approx(2 * M * K, rel=0.05)
    assert forward.flops == pytest.approx(2 * M * (N * K + R * (N + K)), rel=0.05)
    backward = cost(choose_plan(*size, "backward"), *size, "backward")
    assert backward.launches == 3
    assert backward.bytes - product == pytest.approx(2 * M * N + 2 * M * K, rel=0.05)
    assert backward.flops == pytest.approx(2 * M * (N * K + 2 * R * (N + K)), rel=0.05)
    assert backward.part_bytes / 2 < L2_BYTES, "the parts of sums must stay in the cache"


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_decode_streams_the_weight_and_little_else(int8):
    size = HOPPER, BF16, 1, 4096, 4096, 16, int8, 0.0
    found = cost(choose_plan(*size), *size)
    assert found.launches == 1
    assert found.bytes == pytest.approx(4096 * 4096 * (1 if int8 else 2), rel=0.05)


PLANS = {
    ("forward", "decode"): 1, ("forward", "fused"): 1, ("forward", "two_pass"): 2, ("forward", "scratch"): 3,
    ("forward", "cublas"): 4, ("backward", "two_pass"): 3, ("backward", "scratch"): 4, ("backward", "cublas"): 5,
}  # fmt: skip


@pytest.mark.parametrize(("op", "kind"), PLANS)
def test_launches_of_an_int8_layer(device, monkeypatch, op, kind):
    """Counted as they run, and equal to what `cost` counts; cuBLAS's own product is one of them."""
    made, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch, where: (made.append(launch), run(launch, where)))
    plan, shape = Plan(kind, replace(SMALL, splits=2 if kind == "decode" else 1), ""), (13, 64, 48, 8)
    if op == "forward":
        planned_forward(plan, **linear_inputs(shape, BF16, device, int8=True, p=0.1))
    else:
        planned_backward(plan, **backward_inputs(shape, BF16, device, int8=True, p=0.1))
    expected = PLANS[op, kind]
    assert len(made) == expected - (kind == "cublas")
    assert cost(plan, None, BF16, 13, 48, 64, 8, True, 0.1, op).launches == expected


def test_a_decode_plan_refuses_more_tokens_than_a_tile(device):
    with pytest.raises(ValueError, match="x: expected up to 16 tokens for a decode plan, found 17"):
        planned_forward(Plan("decode", SMALL, ""), **linear_inputs((17, 32, 32, 4), BF16, device))


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["scratch", "cublas"])
def test_no_memory_for_the_scratch_converts_in_the_product(device, monkeypatch, caplog, kind, op):
    make, planned = (linear_inputs, planned_forward) if op == "forward" else (backward_inputs, planned_backward)
    inputs = make((13, 64, 48, 8), BF16, device, int8=True)
    expected = planned(Plan("two_pass", SMALL, ""), **inputs)
    empty = torch.empty

    def full(*shape, **options):
        if shape[0] == inputs["w"].shape:
            raise torch.OutOfMemoryError("out of memory")
        return empty(*shape, **options)

    scratch._say_full.cache_clear()
    monkeypatch.setattr(scratch.torch, "empty", full)
    with caplog.at_level(logging.WARNING, logger="fastlora.kernels"):
        for _ in range(2):
            actual = planned(Plan(kind, SMALL, ""), **inputs)
            assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert len(caplog.records) == 1


def test_every_candidate_computes(device):
    for int8 in (False, True):
        inputs = linear_inputs((13, 64, 48, 8), BF16, device, int8=int8)
        exact, _ = reference.lora_linear(**{k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
                                            for k, v in inputs.items()})  # fmt: skip
        plans = candidates(None, BF16, 13, 48, 64, 8, int8, 0.0)
        assert {plan.kind for plan in plans} >= {"decode", "fused", "two_pass", "cublas"}
        assert len(set(plans)) == len(plans)
        for plan in plans[::4]:
            y, _ = planned_forward(plan, **inputs)
            assert (y.double() - exact).abs().max() <= 2**-7 * exact.abs().max(), plan


def test_tables_are_written_and_read(tmp_path):
    row = tables.Row("forward", "bfloat16", True, None, 16, 1, 4096, 4096, "decode", replace(SMALL, splits=4), 7.5)
    table = tables.Table("NVIDIA H200", 90, True, {"torch": "2.13"}, "2026-01-01", (row, replace(row, M=16)))
    tables.write(table, tmp_path / "h200.json")
    assert [file.name for file in tmp_path.iterdir()] == ["h200.json"]
    assert tables.parse(json.loads((tmp_path / "h200.json").read_text()), "h200.json") == table
    assert table.source() == "measured on NVIDIA H200, 2026-01-01"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(schema=2), "expected a plan table of schema 1, found 2"),
        (dict(rows=[dict(kind="magic", op="forward")]), "row 0: kind: expected one of"),
        (dict(rows=[dict(op="sideways")]), "row 0: op: expected one of"),
        (dict(rows=[dict(op="forward", kind="fused", colour="red")]), r"the fields of Row, found also \['colour'\]"),
        (dict(rows=[dict(op="forward", kind="fused", tile={"block_m": 16})]), "t.json: expected .* found TypeError"),
    ],
)  # fmt: skip
def test_broken_tables_are_named(change, message):
    good = dict(schema=1, gpu=None, arch=90, measured=False, versions={}, date=None, rows=[])
    with pytest.raises(ValueError, match=message):
        tables.parse(good | change, "t.json")


def test_a_gpu_prefers_its_own_table(monkeypatch):
    made = [tables.Table(name, 90, name is not None, {}, None, ()) for name in ("NVIDIA H100", "NVIDIA H200", None)]
    monkeypatch.setattr(tables, "shipped", lambda: tuple(made))
    assert tables.tables_for(90, "NVIDIA H200") == [made[1], made[0], made[2]]
    assert tables.tables_for(90, "NVIDIA GH200") == made, "a measured table of the architecture before a rule"
    assert tables.tables_for(80, "NVIDIA A100") == []


def test_what_a_measured_table_lacks_comes_from_the_next(monkeypatch):
    measured = tables.Row("forward", "bfloat16", False, True, 16, 8192, 4096, 4096, "cublas", SMALL, 1.0)
    own = tables.Table("NVIDIA H200", 90, True, {}, None, (measured,))
    rules = tables.shipped()
    monkeypatch.setattr(tables, "shipped", lambda: (own, *rules))
    choose_plan.cache_clear()
    size = HOPPER, BF16, 8192, 4096, 4096, 16, False
    assert choose_plan(*size, 0.1, "forward", "NVIDIA H200").kind == "cublas"
    for other in ((*size, 0.0, "forward"), (*size, 0.1, "backward")):
        found = choose_plan(*other, "NVIDIA H200")
        assert (found.kind, found.why) == ("two_pass", "rule for sm_90, not measured")
    choose_plan.cache_clear()


def test_a_folder_of_tables_may_be_named(tmp_path, monkeypatch):
    table = tables.Table("Made-up GPU", 90, True, {}, "2000-01-01", ())
    tables.write(table, tmp_path / "tuned-made-up-gpu.json")
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.undo()
    shipped = tables.shipped()
    monkeypatch.setenv("FASTLORA_TABLES", str(tmp_path))
    tables.shipped.cache_clear()
    found = tables.shipped()
    tables.shipped.cache_clear()
    assert found == (table, *shipped)


def test_tiles_beside_the_product_come_from_the_nearest_row():
    row = next(row for row in tables.shipped()[0].rows if (row.op, row.M, row.max_rank) == ("shrink", 8192, 16))
    found = side_tile("shrink", HOPPER, BF16, 8192, 4096, 16, 0.1)
    assert replace(found, splits=row.tile.splits) == row.tile
    assert (found, 64 * found.splits) == (spread("shrink", row.tile, 8192, 4096), 256), "two programs a multiprocessor"
    assert side_tile("shrink", HOPPER, BF16, 16000, 8192, 8).block_m == row.tile.block_m
    assert side_tile("shrink", HOPPER, torch.float16, 8192, 4096, 16) == found
    for arch, dtype, rank in ((HOPPER, torch.float32, 16), (HOPPER, BF16, 256), (103, BF16, 16), (None, BF16, 16)):
        for op in SIDE_OPS:
            by_rule = side_tile_by_rule(op, arch, dtype.itemsize, 8192, rank)
            assert side_tile(op, arch, dtype, 8192, 4096, rank) == spread(op, by_rule, 8192, 4096)


@pytest.mark.parametrize("op", SIDE_OPS)
@pytest.mark.parametrize(("M", "C"), [(1, 64), (64, 4096), (2048, 14336), (8192, 4096), (100000, 4096)])
def test_sums_are_shared_by_as_many_programs_as_wanted(op, M, C):
    """No fewer than a sum has parts, and per multiprocessor no more than the tile says, once there are enough tiles."""
    for tile in side_candidates(op, HOPPER, BF16, M, C, 16):
        splits, wanted = spread(op, tile, M, C).splits, tile.splits * MULTIPROCESSORS
        if op in ("shrink", "group_shrink"):
            tiles, parts = -(-M // tile.block_m), C // 512
        else:
            tiles, parts = -(-C // tile.block_n), -(-M // SPAN)
        made = tiles * (-(-parts // splits) if op == "output_reduce" else splits)
        assert made <= max(wanted, tiles)
        assert made > wanted / 4 or made >= tiles * min(parts, 8) / 2, (tile, made)


def test_hopper_candidates_hold_both_ways_to_walk():
    for op, int8 in (("forward", False), ("forward", True), ("backward", False), ("backward", True)):
        found = {
            (plan.kind, plan.tile.persistent) for plan in candidates(HOPPER, BF16, 8192, 4096, 4096, 16, int8, 0.1, op)
        }
        assert {("two_pass", False), ("two_pass", True)} <= found
        assert (("scratch", True) in found) == int8
    few = candidates(HOPPER, BF16, 64, 4096, 4096, 16, False, 0.1)
    assert not any(plan.tile.persistent for plan in few), "fewer tiles than multiprocessors"


def test_counters_of_captured_calls_are_their_own(monkeypatch):
    """Each takes others of the reserve, aligned as memory is, and zeroes new ones where that is at its end."""
    where, zeros = torch.device("cuda", 0), torch.zeros
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(partial, "_reserves", {where: torch.arange(100)})
    monkeypatch.setattr(partial, "_taken", {})
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options) - 1)
    first, second, third, fourth = (partial.counters(count, where) for count in (33, 5, 5, 1))
    assert (first.tolist(), second.tolist()) == (list(range(33)), list(range(64, 69)))
    assert third.tolist() == [-1] * 5
    assert fourth.tolist() == [96]


def test_shipped_tables_hold_what_they_may():
    for table in tables.shipped():
        for row in table.rows:
            assert table.measured == (row.microseconds is not None)
            assert row.kind != "decode" or row.tile.block_m >= row.M
            assert row.op == "forward" or row.kind in ("two_pass", "scratch", "cublas", row.op)
            assert (row.op in SIDE_OPS) == (row.kind == row.op)


def test_the_public_op_follows_the_choice(device, monkeypatch):
    monkeypatch.setattr(
        sys.modules[planned_forward.__module__], "choose_plan", lambda *_: Plan("decode", replace(SMALL, splits=2), "")
    )
    made, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch, where: (made.append(launch), run(launch, where)))
    gpu.lora_linear(**linear_inputs((3, 64, 48, 8), BF16, device))
    assert [launch.kernel.__name__ for launch in made] == ["_decode_kernel"]
