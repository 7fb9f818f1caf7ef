"""Products of int8 codes with int8 codes, in every room against the reference in float64."""

import math

import pytest
import torch
from accuracy import compare
from inputs import DTYPES, linear_inputs
from torch.library import opcheck

from fastlora import ops
from fastlora_kernels import gpu, reference
from fastlora_kernels.gpu.cost import cost
from fastlora_kernels.gpu.partial import counters
from fastlora_kernels.gpu.plan import choose_plan
from fastlora_kernels.gpu.quantize_shrink import quantize_shrink

SHAPES = {"ragged": (37, 100, 63, 5), "several-tiles": (130, 192, 160, 16), "wide-rank": (33, 65, 70, 80)}
THRESHOLDS = {"outliers": 6.0, "many-outliers": 0.5, "no-outliers": math.inf}


def int8_inputs(shape, dtype, device, threshold=6.0, **options):
    """Arguments of `lora_linear` with outliers in x: a feature of all tokens, and single elements."""
    inputs = linear_inputs(shape, dtype, device, int8=True, **options)
    inputs["x"][:, 3] *= 12
    inputs["x"][1::9, 5::31] = 20.0
    return inputs | {"threshold": threshold}


@pytest.mark.parametrize(("threshold", "p"), [(6.0, 0.25), (0.5, 0.0), (math.inf, 0.25)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(room, where, shape, dtype, threshold, p):
    compare(room.lora_linear, reference.lora_linear, int8_inputs(shape, dtype, where, threshold, p=p))


@pytest.mark.parametrize(
    "options", [dict(adapter=False), dict(bias=False), dict(adapter_dtype=torch.bfloat16)], ids=str
)
def test_parts_that_are_not_there(room, where, options):
    compare(room.lora_linear, reference.lora_linear, int8_inputs((37, 100, 63, 5), torch.bfloat16, where, **options))


@pytest.mark.parametrize("rank", [1, 31, 33, 64, 256])
def test_every_rank(room, where, rank):
    compare(room.lora_linear, reference.lora_linear, int8_inputs((20, 48, 40, rank), torch.bfloat16, where, p=0.1))


def test_scale_of_zero(room, where):
    inputs = int8_inputs((37, 100, 63, 5), torch.bfloat16, where) | {"scale": 0.0}
    compare(room.lora_linear, reference.lora_linear, inputs)


def test_any_strides(room, where):
    inputs = int8_inputs((37, 100, 63, 5), torch.bfloat16, where, p=0.1)
    relaid = {name: inputs[name].T.contiguous().T for name in ("x", "w", "a", "b")}
    compare(room.lora_linear, reference.lora_linear, inputs | relaid)


@pytest.mark.parametrize("threshold", THRESHOLDS.values(), ids=THRESHOLDS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_those_of_the_reference(device, dtype, threshold):
    """Bit for bit; and every feature with an outlier is listed once, in order, however many programs see it."""
    x = int8_inputs((70, 1100, 1, 5), dtype, device)["x"]
    x[7], x[8, :2] = 0.0, torch.tensor([math.inf, math.nan])
    codes, _ = quantize_shrink(x, None, 0.0, None, threshold)
    q, x_scale, outliers = reference.quantize_tokens(x, threshold)
    assert torch.equal(codes.q, q)
    assert torch.equal(codes.x_scale, x_scale)
    listed = codes.columns[: codes.count.item()]
    assert listed.tolist() == outliers.any(dim=0).nonzero().flatten().tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only on a GPU are the counters kept from call to call")
def test_marks_are_taken_back(device):
    x = int8_inputs((70, 1100, 1, 5), torch.bfloat16, device)["x"]
    quantize_shrink(x, None, 0.0, None, 6.0)
    assert not counters(1, x.device).any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_no_number_stays_in_its_token(room, where, value):
    inputs = int8_inputs((37, 100, 63, 5), torch.float32, where, adapter=False)
    clean, _ = room.lora_linear(**inputs)
    inputs["x"][4, 9] = value
    y, _ = room.lora_linear(**inputs)
    others = torch.arange(37, device=where) != 4
    assert not torch.isfinite(y[4]).any()
    # The list of features is longer, and its sum of another order.
    torch.testing.assert_close(y[others], clean[others])


def test_few_tokens_stay_as_they_are(room, where):
    inputs = int8_inputs((16, 100, 63, 5), torch.bfloat16, where)
    plain, _ = room.lora_linear(**inputs | {"threshold": None})
    y, _ = room.lora_linear(**inputs)
    assert torch.equal(y, plain)


def test_same_bits_every_time(room, where):
    inputs = int8_inputs((130, 192, 160, 16), torch.bfloat16, where, p=0.1)
    assert all(map(torch.equal, room.lora_linear(**inputs), room.lora_linear(**inputs)))


def test_dense_weight_is_no_matter_of_codes(room, where):
    inputs = linear_inputs((37, 100, 63, 5), torch.bfloat16, where)
    assert torch.equal(room.lora_linear(**inputs, threshold=6.0)[0], room.lora_linear(**inputs)[0])


@pytest.mark.parametrize("sizes", [[(40, 5), (24, 5)], [(40, 5), (24, 12), (16, 1)]], ids=["one-rank", "ranks"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_group_is_its_layers(room, where, sizes, p):
    layers = [int8_inputs((37, 100, N, R), torch.bfloat16, where, p=p) for N, R in sizes]
    x = layers[0]["x"]
    names = ["w", "w_scale", "bias", "a", "b", "scale", "p", "seed"]

    def together(**given):
        ys, ss = room.lora_linear_group(given["x"], *given["lists"], 6.0)
        return [*ys, *ss]

    def alone(**given):
        results = [reference.lora_linear(given["x"], *layer, 6.0) for layer in zip(*given["lists"], strict=True)]
        return [y for y, _ in results] + [s for _, s in results]

    compare(together, alone, {"x": x, "lists": [[layer[name] for layer in layers] for name in names]})


@pytest.mark.parametrize("room", ["reference", "cpu", "gpu"])
def test_opcheck(room, device):
    inputs = int8_inputs((37, 48, 40, 5), torch.bfloat16, "cpu" if room == "cpu" else device, p=0.25)
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "a", "b")}
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear, tuple((inputs | leaves).values()))


def test_gradients_are_those_without_codes(device):
    """Rounding has no gradient: what d_x, d_a and d_b are does not depend on how y was computed."""
    inputs = int8_inputs((37, 100, 63, 5), torch.float32, device, p=0.25)
    d_y, found = torch.randn(37, 63, device=device), []
    for threshold in (6.0, None):
        leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "a", "b")}
        y = ops.lora_linear(**inputs | leaves | {"threshold": threshold})
        found.append(torch.autograd.grad(y, list(leaves.values()), d_y))
    for with_codes, without in zip(*found, strict=True):
        # s comes from a kernel of its own, which may sum in another order.
        torch.testing.assert_close(with_codes, without)


@pytest.mark.parametrize("threshold", [0.0, -6.0, math.nan])
def test_refuses_a_threshold_that_is_none(threshold):
    with pytest.raises(ValueError, match="threshold: expected None or a number above 0, found"):
        ops.lora_linear(**linear_inputs((20, 8, 8, 2), torch.float32, "cpu", int8=True), threshold=threshold)


def test_two_launches(monkeypatch, device):
    """One pass over x for its codes and s, and one product."""
    from fastlora_kernels.gpu.launch import Launch

    launched, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self, device: launched.append(self.kernel.__name__) or run(self, device))
    gpu.lora_linear(**int8_inputs((37, 100, 63, 5), torch.bfloat16, device, p=0.1))
    assert launched == ["_quantize_shrink_kernel", "_int8_linear_kernel"]


def test_counted_bytes():
    """x is read once, its codes are written and read, W, y and s pass once: within a hundredth."""
    M, N, K, R = 8192, 4096, 4096, 16
    plan = choose_plan(90, torch.bfloat16, M, N, K, R, True, 0.1, "int8")
    counted = cost(plan, 90, torch.bfloat16, M, N, K, R, True, 0.1, "int8")
    assert counted.launches == 2
    assert counted.bytes == pytest.approx(2 * M * K + 2 * M * K + N * K + 2 * M * N + 4 * M * R, rel=0.01)
    assert counted.flops == 2 * M * (N * K + N * R + R * K)
