"""A batch whose rows have different adapters, beside the same batch with one; in inference and in training."""

from __future__ import annotations

import pytest
import torch
from gpu_layers import ALPHA, Holder, Shape, fill_adapters
from harness import assert_accurate
from peers import imported
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora.adapters.mixing import mix_rows

pytestmark = pytest.mark.gpu
ROWS, ONE = 8, "one adapter"


def ours(shape: Shape, names: list[str]) -> nn.Module:
    model = Holder(shape, 0)
    for name in names:
        fastlora.patch(model, r=shape.r, targets=["proj"], alpha=ALPHA, dropout=shape.p, adapter=name)
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


def batch_of(shape: Shape, count: int) -> tuple[Tensor, list[str], list[str]]:
    """x with its rows, the adapters, and the adapter of each row: at least one row each."""
    names = [f"a{index}" for index in range(count)]
    rows = [names[index % count] for index in range(min(shape.M, max(ROWS, count)))]
    return shape.x(0).view(len(rows), -1, shape.K), names, rows


def set_rows(model: nn.Module, names: list[str], rows: list[str]) -> nn.Module:
    """For good, as a server sets them once for all tokens that it generates for a batch."""
    mix_rows(model, torch.tensor([names.index(name) for name in rows]), names)
    return model


@pytest.mark.parametrize("count", [1, 4, 8, 64])
def test_mixed_batch(race, place, count):
    shape = place.shape(8192, 4096, 4096, p=0.0)
    x, names, rows = batch_of(shape, count)
    check_accuracy(ours(shape, names), x, rows)

    def infer(model: nn.Module) -> list:
        def call() -> Tensor:
            with torch.no_grad():
                return model(x)

        return [call]

    def one() -> list:
        return infer(ours(shape, names[:1]))

    def mixed() -> list:
        return infer(set_rows(ours(shape, names), names, rows))

    def mixed_of_peft() -> list:
        peft_model = theirs(shape, names)

        def call() -> Tensor:
            with torch.no_grad():
                return peft_model(x, adapter_names=rows)

        return [call]

    builders = {ONE: one, "fastlora": mixed, "PEFT": mixed_of_peft}
    race("mixed batch", f"{count} adapters, {shape.name}", builders, [ONE], sizes=shape.sizes)


@pytest.mark.parametrize("count", [8, 64])
def test_mixed_training(race, place, count):
    """Forward and backward, with dropout."""
    shape = place.shape(8192, 4096, 4096)
    x, names, rows = batch_of(shape, count)
    d_y = shape.d_y(0).view(len(rows), -1, shape.N)

    def train(model: nn.Module) -> list:
        model, inputs = model.train(), x.clone().requires_grad_()

        def call() -> None:
            model(inputs).backward(d_y)

        return [call]

    def one() -> list:
        return train(ours(shape, names[:1]))

    def mixed() -> list:
        return train(set_rows(ours(shape, names), names, rows))

    case = f"{count} adapters, {shape.name}"
    race("mixed batch, forward + backward", case, {ONE: one, "fastlora": mixed}, [ONE], sizes=shape.sizes)
