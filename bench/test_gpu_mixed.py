"""A batch whose rows have different adapters, beside the same batch with one."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import ALPHA, Holder, Shape, fill_adapters
from harness import assert_accurate
from peers import imported
from torch import Tensor, nn

import fastlora
from fastlora import ops

pytestmark = pytest.mark.gpu
ROWS, ONE = 8, "one adapter"


def ours(shape: Shape, names: list[str]) -> nn.Module:
    model = Holder(shape, 0)
    for name in names:
        fastlora.patch(model, r=shape.r, targets=["proj"], alpha=ALPHA, adapter=name)
    return fill_adapters(model).eval()


def theirs(shape: Shape, names: list[str]) -> nn.Module:
    peft = imported("peft")
    config = peft.LoraConfig(r=shape.r, lora_alpha=ALPHA, target_modules=["proj"])
    model = peft.get_peft_model(Holder(shape, 0), config, names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    return fill_adapters(model).eval()


def check_accuracy(model: nn.Module, x: Tensor, rows: list[str]) -> None:
    def mixed() -> Tensor:
        with torch.no_grad(), fastlora.mixed(model, rows):
            return model(x)

    found = mixed()
    with ops.using("reference"):
        eager = mixed()
        exact = torch.cat([row_of(model, x[i : i + 1], name) for i, name in enumerate(rows)])
    assert_accurate("mixed", found.float() - exact, eager.float() - exact)


def row_of(model: nn.Module, x: Tensor, adapter: str) -> Tensor:
    """One row in float32 with one adapter."""
    layer = model.proj
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    with torch.no_grad():
        return x.float() @ layer.weight.float().T + layer.scaling[adapter] * (x.float() @ a.T) @ b.T


@pytest.mark.parametrize("count", [4, 8])
def test_mixed_batch(race, place, count):
    shape = place.shape(8192, 4096, 4096, p=0.0)
    names = [f"a{index}" for index in range(count)]
    rows = [names[index % count] for index in range(ROWS)]
    x = shape.x(0).view(ROWS, -1, shape.K)
    model = ours(shape, names)
    check_accuracy(model, x, rows)

    def one() -> list:
        def call() -> Tensor:
            with torch.no_grad():
                return model(x)

        return [call]

    def mixed() -> list:
        def call() -> Tensor:
            with torch.no_grad(), fastlora.mixed(model, rows):
                return model(x)

        return [call]

    def mixed_of_peft() -> list:
        peft_model = theirs(shape, names)

        def call() -> Tensor:
            with torch.no_grad():
                return peft_model(x, adapter_names=rows)

        return [call]

    builders = {ONE: one, "fastlora": mixed, "PEFT": mixed_of_peft}
    race("mixed batch", f"{count} adapters, {shape.name}", builders, [ONE], sizes=shape.sizes)
