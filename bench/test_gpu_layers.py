"""Several LoRA linears at once: a group that reads one tensor, the seven of a Llama-8B layer, and the whole layer."""

from __future__ import annotations

import pytest
import torch
from gpu_models import (
    HIDDEN,
    Embedded,
    Readers,
    SevenLinears,
    frozen,
    llama_layer,
    made,
    ours,
    ours_int8,
    peft_fp32,
    peft_int8,
    peft_model,
    step,
    tokens,
)
from harness import assert_accurate
from torch import nn

from fastlora import ops

pytestmark = pytest.mark.gpu
FLOOR = "frozen"
OVER = [FLOOR, "PEFT bf16"]
M = 8192


def work_of(layers: list[tuple[int, int]], tokens: int) -> dict[str, float]:
    """Of the frozen products of (N, K), forward and backward; layers that read one tensor read it each for itself."""
    flop = sum(4.0 * tokens * N * K for N, K in layers)
    return {"flop": flop, "bytes": sum(4.0 * (tokens * (N + K) + N * K) for N, K in layers)}


def contenders(make, place, inputs) -> dict:
    return {
        FLOOR: lambda: step(make, frozen, place, inputs),
        "fastlora bf16": lambda: step(make, ours, place, inputs),
        "fastlora int8": lambda: step(make, ours_int8, place, inputs),
        "PEFT bf16": lambda: step(make, peft_model, place, inputs),
        "PEFT as users get it": lambda: step(make, peft_fp32, place, inputs, autocast=True),
        "PEFT + bitsandbytes int8": lambda: step(make, peft_int8, place, inputs),
    }


def check_accuracy(make, place, inputs) -> None:
    """Outputs and gradients without dropout: our errors against float32 are those of eager PyTorch in bf16."""
    found = results(ours(made(make, frozen, place), p=0.0), inputs)
    exact_model = ours(made(make, frozen, place), p=0.0).float()
    exact = results(exact_model, [x.float() for x in inputs])
    eager = eager_results(make, place, inputs)
    for index, (one, other, true) in enumerate(zip(found, eager, exact, strict=True)):
        assert_accurate(f"result {index}", one.float() - true, other.float() - true)


def results(model: nn.Module, inputs: list) -> list:
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(outputs, [*inputs, *trained], [torch.ones_like(y) for y in outputs])
    return [*(y.detach() for y in outputs), *gradients]


def eager_results(make, place, inputs) -> list:
    with ops.using("reference"):
        return results(ours(made(make, frozen, place), p=0.0), inputs)


GROUPS = {
    "q, k, v of Llama-8B": {"q_proj": HIDDEN, "k_proj": HIDDEN // 4, "v_proj": HIDDEN // 4},
    "q, k, v of one width": {"q_proj": HIDDEN, "k_proj": HIDDEN, "v_proj": HIDDEN},
    "gate, up of Llama-8B": {"gate_proj": 14336, "up_proj": 14336},
}


@pytest.mark.parametrize("name", GROUPS)
def test_group(race, place, name):
    def make() -> nn.Module:
        return Readers(place.size(HIDDEN), {target: place.size(N) for target, N in GROUPS[name].items()})

    inputs = [tokens(place, M, HIDDEN)]
    check_accuracy(make, place, inputs)
    work = work_of([(N, HIDDEN) for N in GROUPS[name].values()], M)
    case = f"{name}, {len(inputs[0])} tokens"
    race("group, forward + backward", case, contenders(make, place, inputs), OVER, work=work)


def test_seven_linears(race, place):
    inputs = [tokens(place, M, width, seed) for seed, width in enumerate((HIDDEN, HIDDEN, HIDDEN, 14336))]

    def make() -> nn.Module:
        return SevenLinears(place)

    check_accuracy(make, place, inputs)
    with torch.device("meta"):
        linears = [layer for layer in make().modules() if isinstance(layer, nn.Linear)]
    work = work_of([(layer.out_features, layer.in_features) for layer in linears], M)
    race("seven linears", f"Llama-8B, {len(inputs[0])} tokens", contenders(make, place, inputs), OVER, work=work)


def test_whole_layer(race, place):
    x = tokens(place, M, HIDDEN)[None]

    def make() -> nn.Module:
        return Embedded(llama_layer(place))

    check_accuracy(make, place, [x[:, : max(1, x.shape[1] // 8)]])
    race("whole layer", f"Llama-8B, {x.shape[1]} tokens", contenders(make, place, [x]), OVER)


@pytest.mark.full  # compiling takes longer than all the rest
def test_whole_layer_compiled(race, place):
    x = tokens(place, M, HIDDEN)[None]
    backend = "eager" if place.tiny else "inductor"

    def make() -> nn.Module:
        return Embedded(llama_layer(place))

    def compiled(adapt):
        return lambda model: torch.compile(adapt(model), backend=backend)

    builders = {
        FLOOR: lambda: step(make, compiled(frozen), place, [x]),
        "fastlora bf16": lambda: step(make, compiled(ours), place, [x]),
        "PEFT bf16": lambda: step(make, compiled(peft_model), place, [x]),
    }
    race("whole layer, all compiled", f"Llama-8B, {x.shape[1]} tokens", builders, OVER)
