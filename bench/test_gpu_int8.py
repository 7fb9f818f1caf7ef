"""What an int8 base costs beside one in bf16, and beside PEFT's with bitsandbytes."""

from __future__ import annotations

import pytest
from gpu_layers import (
    check_linear,
    forward,
    frozen,
    gemlite_int8,
    ours,
    ours_in_int8,
    ours_int8,
    peft_int8,
    torchao_int8,
    training,
)

from fastlora_kernels.reference import OUTLIER_THRESHOLD

pytestmark = pytest.mark.gpu
FLOOR = "frozen bf16, cuBLAS"
OVER = [FLOOR, "fastlora bf16", "PEFT + bitsandbytes int8"]


@pytest.mark.parametrize("N", [4096, 14336])
def test_forward_and_backward(race, place, N):
    shape = place.shape(8192, 4096, N)
    check_linear(shape, int8=True)
    check_linear(shape, int8=True, threshold=OUTLIER_THRESHOLD)
    builders = {
        FLOOR: lambda: training(frozen, shape),
        "fastlora bf16": lambda: training(ours, shape),
        "fastlora int8": lambda: training(ours_int8, shape, weight=1.0),
        "fastlora int8, compute int8": lambda: training(ours_in_int8, shape, weight=1.0),
        "PEFT + bitsandbytes int8": lambda: training(peft_int8, shape, weight=1.0),
    }
    work = {"flop": shape.flop(2), "bytes": 2 * shape.bytes(1.0)}
    race("int8, forward + backward", shape.name, builders, OVER, sizes=shape.sizes, work=work)


@pytest.mark.parametrize("M", [512, 2048, 8192])
def test_forward(race, place, M):
    shape = place.shape(M, 4096, 4096, p=0.0)
    check_linear(shape, int8=True)
    check_linear(shape, int8=True, threshold=OUTLIER_THRESHOLD)
    builders = {
        FLOOR: lambda: forward(frozen, shape, grad=False),
        "fastlora bf16": lambda: forward(ours, shape, grad=False),
        "fastlora int8": lambda: forward(ours_int8, shape, grad=False, weight=1.0),
        "fastlora int8, compute int8": lambda: forward(ours_in_int8, shape, grad=False, weight=1.0),
        "PEFT + bitsandbytes int8": lambda: forward(peft_int8, shape, grad=False, weight=1.0),
        "torchao int8 without LoRA": lambda: forward(torchao_int8, shape, grad=False, weight=1.0),
        "gemlite int8 without LoRA": lambda: forward(gemlite_int8, shape, grad=False, weight=1.0),
    }
    work = {"flop": shape.flop(), "bytes": shape.bytes(1.0)}
    race("int8, forward", shape.name, builders, OVER, seconds=1.0, sizes=shape.sizes, work=work)
