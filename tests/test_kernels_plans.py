"""Every plan of the GPU kernels against the reference in float64, and what the choice of a plan rests on."""

import functools
from dataclasses import replace

import pytest
from accuracy import compare
from inputs import DTYPES, backward_inputs, linear_inputs

from fastlora_kernels import reference
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
    "cublas": Plan("cublas", SMALL, ""),
}
BACKWARD = {name: FORWARD[name] for name in ("two-pass", "two-pass-tma", "scratch-tma", "cublas")}
ALIGNED, RAGGED = (40, 96, 64, 8), (37, 100, 63, 5)


def check(which, plan, shape, dtype, device, **options):
    planned, make, name = {
        "forward": (planned_forward, linear_inputs, "lora_linear"),
        "backward": (planned_backward, backward_inputs, "lora_linear_backward"),
    }[which]
    if plan.kind == "decode":
        shape = (min(shape[0], 13), *shape[1:])
    compare(functools.partial(planned, plan), getattr(reference, name), make(shape, dtype, device, **options))


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
