"""One LoRA linear on a GPU: forward, and forward with backward, beside PEFT and beside the frozen product alone."""

from __future__ import annotations

import pytest
from gpu_layers import (
    check_linear,
    forward,
    frozen,
    ours,
    ours_int8,
    peft_compiled,
    peft_fp32,
    peft_layer,
    training,
)

pytestmark = pytest.mark.gpu
SHAPES = [(8192, 4096, 4096), (8192, 4096, 14336)]
FLOOR = "frozen, cuBLAS"
OVER = [FLOOR, "PEFT bf16", "PEFT as users get it"]
SWEEP = [1, 16, 64, 256, 1024, 4096]


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_forward_and_backward(race, place, M, K, N):
    shape = place.shape(M, K, N)
    check_linear(shape)
    builders = {
        FLOOR: lambda: training(frozen, shape),
        "fastlora bf16": lambda: training(ours, shape),
        "PEFT bf16": lambda: training(peft_layer, shape),
        "PEFT as users get it": lambda: training(peft_fp32, shape, autocast=True),
    }
    work = {"flop": shape.flop(2), "bytes": 2 * shape.bytes()}
    race("linear, forward + backward", shape.name, builders, OVER, sizes=shape.sizes, work=work)


@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_forward(race, place, M, K, N):
    shape = place.shape(M, K, N)
    check_linear(shape)
    builders = {
        FLOOR: lambda: forward(frozen, shape),
        "fastlora bf16": lambda: forward(ours, shape),
        "PEFT bf16": lambda: forward(peft_layer, shape),
        "PEFT as users get it": lambda: forward(peft_fp32, shape, autocast=True),
    }
    work = {"flop": shape.flop(), "bytes": shape.bytes()}
    race("linear, forward", shape.name, builders, OVER, sizes=shape.sizes, work=work)


@pytest.mark.full
@pytest.mark.parametrize("M", SWEEP)
def test_forward_by_tokens(race, place, M):
    """Speed over the number of tokens, without dropout and without Python, for the plot."""
    shape = place.shape(M, 4096, 4096, p=0.0)
    check_linear(shape)
    check_linear(shape, int8=True)
    builders = {
        FLOOR: lambda: forward(frozen, shape, grad=False),
        "fastlora bf16": lambda: forward(ours, shape, grad=False),
        "fastlora int8": lambda: forward(ours_int8, shape, grad=False, weight=1.0),
        "PEFT bf16": lambda: forward(peft_layer, shape, grad=False),
    }
    work = {"flop": shape.flop(), "bytes": shape.bytes()}
    race(
        "linear by tokens", shape.name, builders, [FLOOR, "PEFT bf16"], graphed=True, seconds=0.7,
        sizes=shape.sizes, work=work,
    )  # fmt: skip


@pytest.mark.full  # compiling takes longer than all the rest
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_against_compiled(race, place, M, K, N):
    shape = place.shape(M, K, N)
    check_linear(shape)
    compiled = "PEFT bf16, torch.compile"
    builders = {
        FLOOR: lambda: training(frozen, shape),
        "fastlora bf16": lambda: training(ours, shape),
        compiled: lambda: training(peft_compiled, shape),
    }
    work = {"flop": shape.flop(2), "bytes": 2 * shape.bytes()}
    race("linear, compiled peer", shape.name, builders, [FLOOR, compiled], sizes=shape.sizes, work=work)
