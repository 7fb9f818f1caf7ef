"""What one Llama-8B layer holds for its backward: its linears and activation, and all of it."""

from __future__ import annotations

import pytest
import torch
from gpu import NotInstalledError
from gpu_models import (
    HIDDEN,
    Embedded,
    frozen,
    held_by_linears,
    llama_layer,
    made,
    ours,
    ours_int8,
    peft_int8,
    peft_model,
    tokens,
)
from harness import rows_from_values, rows_not_run
from memory import bytes_for_backward

pytestmark = pytest.mark.gpu
MIB = 1 << 20
OVER = ["frozen", "PEFT bf16"]


CONTENDERS = {
    "frozen": frozen, "fastlora bf16": ours, "fastlora int8": ours_int8, "PEFT bf16": peft_model,
    "PEFT + bitsandbytes int8": peft_int8,
}  # fmt: skip


@pytest.mark.parametrize("part", ["linears and activation", "whole layer"])
@pytest.mark.parametrize("count", [1024, 4096, 8192])
def test_bytes_for_backward(record, place, count, part):
    values, notes, count_bytes = {}, {}, held_by_layer if part == "whole layer" else held_by_linears
    for name, adapt in CONTENDERS.items():
        try:
            values[name] = count_bytes(adapt, place, count) / MIB
        except NotInstalledError as error:
            notes[name] = f"not installed: {error}"
    assert values["fastlora bf16"] < values["PEFT bf16"]
    case = f"{part}, {place.size(count)} tokens"
    rows = rows_from_values("bytes for backward, GPU", case, values, OVER, "MiB", {"M": place.size(count)})
    record(rows + rows_not_run("bytes for backward, GPU", case, notes))


def held_by_layer(adapt, place, count: int) -> int:
    model = made(lambda: Embedded(llama_layer(place)), adapt, place)
    inputs = tokens(place, count, HIDDEN)[None].requires_grad_()
    return bytes_for_backward(model, lambda: model(inputs).sum())


def test_peak_of_a_step(record, place):
    """The memory of a forward and backward above that of weights and inputs, by the allocator's count."""
    if place.device != "cuda":
        pytest.skip("the allocator of a CPU does not count")
    x = tokens(place, 8192, HIDDEN)[None]
    values = {}
    for name, adapt in {"frozen": frozen, "fastlora bf16": ours, "PEFT bf16": peft_model}.items():
        model, inputs = made(lambda: Embedded(llama_layer(place)), adapt, place), x.clone().requires_grad_()
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(inputs).backward(torch.ones_like(x))
            values[name] = (torch.cuda.max_memory_allocated() - before) / MIB
    case = f"Llama-8B layer, {x.shape[1]} tokens"
    record(rows_from_values("peak of a step, GPU", case, values, OVER, "MiB", {"M": x.shape[1]}))
