"""One token, or a few: a LoRA linear in int8 beside the product with a bf16 weight and no adapter."""

from __future__ import annotations

import pytest
from gpu_layers import check_linear, forward, frozen, gemlite_int8, ours, ours_int8, peft_layer, torchao_int8

pytestmark = pytest.mark.gpu
FLOOR = "bf16 without LoRA, cuBLAS"
OVER = [FLOOR, "PEFT bf16"]


def builders_for(shape) -> dict:
    return {
        FLOOR: lambda: forward(frozen, shape, grad=False),
        "fastlora int8": lambda: forward(ours_int8, shape, grad=False, weight=1.0),
        "fastlora bf16": lambda: forward(ours, shape, grad=False),
        "PEFT bf16": lambda: forward(peft_layer, shape, grad=False),
        "torchao int8 without LoRA": lambda: forward(torchao_int8, shape, grad=False, weight=1.0),
        "gemlite int8 without LoRA": lambda: forward(gemlite_int8, shape, grad=False, weight=1.0),
    }


@pytest.mark.parametrize("launched", ["as a CUDA graph", "by Python"])
@pytest.mark.parametrize("N", [4096, 14336])
def test_decode(race, place, N, launched):
    """As a graph the GPU's time counts, launched by Python that of whichever is slower."""
    shape = place.shape(1, 4096, N, p=0.0)
    check_linear(shape)
    check_linear(shape, int8=True)
    graphed = launched == "as a CUDA graph"
    race(
        "decode", f"{shape.name}, {launched}", builders_for(shape), OVER, graphed=graphed, launch_bound=not graphed,
        sizes=shape.sizes, work={"flop": shape.flop(), "bytes": shape.bytes(1.0)},
    )  # fmt: skip
