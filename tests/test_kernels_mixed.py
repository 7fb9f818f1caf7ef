"""The launches of a mixed batch: every plan, what they cost, and what they must not touch."""

import math
import sys

import pytest
import torch
from accuracy import compare
from test_mixed_ops import BATCHES, backward_inputs, mixed_inputs

from fastlora_kernels import gpu, reference
from fastlora_kernels.gpu.cost import cost, mixed_cost
from fastlora_kernels.gpu.plan import Plan, choose_plan
from fastlora_kernels.gpu.tiles import Tile

HOPPER, BF16, L2_BYTES = 90, torch.bfloat16, 50e6
PLANS = {
    "decode": Plan("decode", Tile(64, 16, 32, 4, 2, splits=2), ""),
    "two_pass": Plan("two_pass", Tile(16, 32, 32, 4, 2), ""),
    "scratch": Plan("scratch", Tile(32, 16, 32, 4, 2), ""), "cublas": Plan("cublas", Tile(16, 16, 32, 4, 2), ""),
}  # fmt: skip


@pytest.fixture(params=PLANS)
def planned(request, monkeypatch):
    """Has the op follow a plan."""
    plan = PLANS[request.param]
    monkeypatch.setattr(sys.modules[gpu.lora_linear_mixed.__module__], "choose_plan", lambda *_: plan)
    return plan


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_every_plan(planned, device, int8):
    forward = mixed_inputs(BATCHES["several-in-a-tile"], BF16, device, int8=int8, p=0.25)
    compare(gpu.lora_linear_mixed, reference.lora_linear_mixed, forward)
    if planned.kind != "decode":
        backward = backward_inputs(BATCHES["several-in-a-tile"], BF16, device, int8=int8, p=0.25)
        compare(gpu.lora_linear_mixed_backward, reference.lora_linear_mixed_backward, backward)


def test_transposed_operands(device):
    inputs = backward_inputs(BATCHES["ragged"], BF16, device, p=0.25)
    inputs |= {name: inputs[name].T.contiguous().T for name in ("d_y", "x", "s", "w", "a", "b")}
    compare(gpu.lora_linear_mixed_backward, reference.lora_linear_mixed_backward, inputs)
    forward = mixed_inputs(BATCHES["ragged"], BF16, device, p=0.25)
    forward |= {name: forward[name].T.contiguous().T for name in ("x", "w", "a", "b")}
    compare(gpu.lora_linear_mixed, reference.lora_linear_mixed, forward)


def test_rows_of_several_slices(device, monkeypatch):
    """Sums over more tokens than one program takes, of rows that share an adapter with others between them."""
    sliced = Tile(32, 64, 0, 4, 2, splits=99)
    monkeypatch.setattr(sys.modules["fastlora_kernels.gpu.token_reduce"], "side_tile", lambda *_: sliced)
    monkeypatch.setattr(sys.modules["fastlora_kernels.gpu.output_reduce"], "SPAN", 32)
    inputs = backward_inputs((70, [1, 0, -1, 1], [2, 3]), torch.float32, device)
    compare(gpu.lora_linear_mixed_backward, reference.lora_linear_mixed_backward, inputs)


def test_an_adapter_that_no_token_has_is_not_read(device):
    forward = mixed_inputs((3, [0, 2, -1], [3, 4, 5]), torch.float32, device)
    backward = backward_inputs((3, [0, 2, -1], [3, 4, 5]), torch.float32, device)
    for inputs in (forward, backward):
        inputs["a"][3:7], inputs["b"][:, 3:7] = math.nan, math.inf
    outputs = *gpu.lora_linear_mixed(**forward), *gpu.lora_linear_mixed_backward(**backward)
    assert all(torch.isfinite(output).all() for output in outputs)
    assert not outputs[3][3:7].any()
    assert not outputs[4][:, 3:7].any()


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("adapters", [4, 8, 64])
def test_several_adapters_cost_what_one_does(adapters, op, int8):
    """But for reading the A and B of each, and writing their gradients."""
    M, N, K, R = 8192, 4096, 4096, 16
    size = HOPPER, BF16, M, N, K
    one = cost(choose_plan(*size, R, int8, 0.05, op), *size, R, int8, 0.05, op)
    several = mixed_cost(*size, [R] * adapters, max(8, adapters), int8, 0.05, op)
    own_weights = 4 * R * (N + K) * (1 if op == "forward" else 2)
    assert several.launches == one.launches
    assert several.flops == pytest.approx(one.flops, rel=0.01)
    assert several.bytes - (adapters - 1) * own_weights == pytest.approx(one.bytes, rel=0.01)
    assert several.part_bytes / 2 < L2_BYTES, "the parts of sums must stay in the cache"


@pytest.mark.parametrize(("M", "kind", "launches"), [(16, "decode", 2), (64, "two_pass", 2), (8192, "scratch", 3)])
def test_launches_of_an_int8_layer(M, kind, launches):
    found = mixed_cost(HOPPER, BF16, M, 4096, 4096, [16] * 8, 16, True, 0.0)
    assert (choose_plan(HOPPER, BF16, M, 4096, 4096, 16, True, 0.5).kind, found.launches) == (kind, launches)


def test_numbers_of_adapters_reach_the_device_once(device, monkeypatch):
    from fastlora_kernels.gpu import owners

    inputs = mixed_inputs(BATCHES["ragged"], BF16, device)
    first = gpu.lora_linear_mixed(**inputs)
    monkeypatch.setattr(owners, "_written", None)  # would be called
    again = gpu.lora_linear_mixed(**inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_refuses_what_the_kernels_do_not_take(device):
    inputs = mixed_inputs((2, [0, 1], [3, 257]), torch.float32, device)
    with pytest.raises(ValueError, match="rank: expected 1 to 256, found 257"):
        gpu.lora_linear_mixed(**inputs)
    inputs = mixed_inputs((2, [0, 1], [3, 4]), torch.float32, device)
    with pytest.raises(ValueError, match=r"a: expected shape \[7, 70\], found \[6, 70\]"):
        gpu.lora_linear_mixed(**inputs | dict(a=inputs["a"][1:]))
