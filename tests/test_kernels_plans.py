"""Every plan of the GPU kernels against the reference in float64."""

import functools
from dataclasses import replace

import pytest
import torch
from accuracy import compare
from inputs import DTYPES, backward_inputs, linear_inputs
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora_kernels import reference
from fastlora_kernels.gpu.launch import Launch
from fastlora_kernels.gpu.lora_linear import planned_forward
from fastlora_kernels.gpu.lora_linear_backward import planned_backward
from fastlora_kernels.gpu.plan import Plan
from fastlora_kernels.gpu.tiles import Tile

SMALL = Tile(16, 32, 32, 4, 2)
FORWARD = {
    "decode": Plan("decode", replace(SMALL, splits=3), ""),
    "decode-tma": Plan("decode", replace(SMALL, tma=True, splits=2), ""),
    "decode-one-split": Plan("decode", SMALL, ""),
    "fused": Plan("fused", SMALL, ""),
    "fused-tma": Plan("fused", replace(SMALL, tma=True), ""),
    "two-pass": Plan("two_pass", SMALL, ""),
    "two-pass-tma": Plan("two_pass", replace(SMALL, tma=True, persistent=True), ""),
    "scratch-tma": Plan("scratch", replace(SMALL, tma=True), ""),
    "scratch-persistent": Plan("scratch", replace(SMALL, tma=True, persistent=True), ""),
    "cublas": Plan("cublas", SMALL, ""),
}
BACKWARD = {name: FORWARD[name] for name in ("two-pass", "two-pass-tma", "scratch-tma", "scratch-persistent", "cublas")}
ALIGNED, RAGGED = (40, 96, 64, 8), (37, 100, 63, 5)


def check(which, plan, shape, dtype, device, **options):
    planned, make, name = {
        "forward": (planned_forward, linear_inputs, "lora_linear"),
        "backward": (planned_backward, backward_inputs, "lora_linear_backward"),
    }[which]
    if plan.kind == "decode":
        shape = (min(shape[0], 13), *shape[1:])
    planned = with_descriptors(planned) if all(size % 16 == 0 for size in shape[1:3]) else planned
    compare(functools.partial(planned, plan), getattr(reference, name), make(shape, dtype, device, **options))


def with_descriptors(planned):
    """The same, held to load what it multiplies with the weight through descriptors where the plan says so."""

    def run(plan, **inputs):
        made, launch = [], Launch.run
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "run", lambda one, device: (made.append(one), launch(one, device)))
            results = planned(plan, **inputs)
        tiles = [one.arguments for one in made if "TMA" in one.arguments and one.arguments["N"] * one.arguments["K"]]
        assert bool(tiles) != (plan.kind == "cublas")
        for arguments in tiles:
            refs = [value for name, value in arguments.items() if name.endswith("_ref")]
            assert len(refs) == 2
            assert arguments["TMA"] == plan.tile.tma
            assert all(isinstance(ref, TensorDescriptor) == plan.tile.tma for ref in refs)
        return results

    return run


CASES = [("forward", name, plan) for name, plan in FORWARD.items()] + [
    ("backward", name, plan) for name, plan in BACKWARD.items()
]
every_plan = pytest.mark.parametrize(
    ("which", "plan"), [(which, plan) for which, _, plan in CASES], ids=[f"{which}-{name}" for which, name, _ in CASES]
)


@every_plan
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [ALIGNED, RAGGED], ids=["aligned", "ragged"])
def test_plan_matches_reference(device, which, plan, shape, dtype, int8):
    check(which, plan, shape, dtype, device, int8=int8, p=0.1)


@every_plan
def test_plan_without_dropout_or_bias(device, which, plan):
    options = {"bias": False} if which == "forward" else {}
    check(which, plan, ALIGNED, torch.bfloat16, device, int8=True, **options)


@every_plan
def test_plan_for_the_frozen_layer_alone(device, which, plan):
    for int8 in (False, True):
        check(which, plan, (*ALIGNED[:3], 1), torch.float32, device, int8=int8, adapter=False)


@every_plan
def test_plan_with_strides_that_tma_does_not_take(device, which, plan):
    """Column-major operands, and rows that start at odd places, load through pointers."""
    planned = planned_forward if which == "forward" else planned_backward
    make = linear_inputs if which == "forward" else backward_inputs
    inputs = make((13, 96, 64, 8), torch.float16, device, int8=True, p=0.1)
    expected = planned(plan, **inputs)
    name = "x" if which == "forward" else "d_y"
    for relaid in (inputs[name].T.contiguous().T, torch.nn.functional.pad(inputs[name], (1, 2))[:, 1:-2]):
        changed = inputs | {name: relaid, "w": inputs["w"].T.contiguous().T}
        if plan.kind == "cublas":
            eager = reference.lora_linear if which == "forward" else reference.lora_linear_backward
            compare(functools.partial(planned, plan), eager, changed)
        else:
            assert all(torch.equal(one, other) for one, other in zip(planned(plan, **changed), expected, strict=True))


@every_plan
def test_plan_gives_the_same_bits_again(device, which, plan):
    planned = planned_forward if which == "forward" else planned_backward
    make = linear_inputs if which == "forward" else backward_inputs
    inputs = make((13 if which == "forward" else 270, 96, 64, 8), torch.bfloat16, device, int8=True, p=0.1)
    first, second = planned(plan, **inputs), planned(plan, **inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("rank", [1, 16, 65, 130, 256])
@every_plan
def test_plan_at_every_kind_of_rank(device, which, plan, rank):
    if plan.kind in ("decode", "fused") and rank > 65:
        pytest.skip("the table gives these plans ranks up to 64 only")
    check(which, plan, (13, 64, 48, rank), torch.float16, device, p=0.1)
