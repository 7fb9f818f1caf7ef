"""What a LoRA layer costs beyond its arithmetic: its call at one token and 64 features, less the same ops called bare.

The product is so small that next to nothing but the calls is left. One thread: waking a second one for a product
of this size costs more than the product, and is neither arithmetic nor the layer's doing.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from harness import Laps, Row, share, threads
from torch import Tensor, nn
from torch.nn.functional import linear

import fastlora

pytestmark = pytest.mark.cpu
FEATURES, RANK, CALLS = 64, 8, 300


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):
        yield


class Holder(nn.Module):
    """A model with one target."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(FEATURES, FEATURES, bias=False, dtype=dtype)


def layers(dtype: torch.dtype) -> dict[str, nn.Module]:
    config = peft.LoraConfig(r=RANK, target_modules=["proj"])
    adapted = peft.get_peft_model(Holder(dtype), config, autocast_adapter_dtype=False)
    return {
        "nn.Linear": Holder(dtype).requires_grad_(False).proj,
        "fastlora": fastlora.patch(Holder(dtype), r=RANK, targets=["proj"]).proj,
        "PEFT": adapted.base_model.model.proj,
    }


def arithmetic(x: Tensor, grad: bool) -> Callable[[], Tensor]:
    """A LoRA layer as three bare products, with nothing cast, checked or looked up."""
    w, a = torch.randn(FEATURES, FEATURES, dtype=x.dtype), torch.randn(RANK, FEATURES, dtype=x.dtype)
    b = torch.randn(FEATURES, RANK, dtype=x.dtype)
    a.requires_grad_(grad), b.requires_grad_(grad)
    return lambda: linear(x, w).addmm_(linear(x, a), b.T)


def backward_too(call: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], None]:
    gradient = torch.randn(1, FEATURES, dtype=dtype)
    return lambda: call().backward(gradient)


def repeated(call: Callable[[], object], grad: bool) -> Callable[[], None]:
    """Many calls as one contender: a single one is too short for the clock."""

    def run() -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(CALLS):
                call()

    return run


def overheads(laps: Laps, floors: dict[str, str], case: str) -> list[Row]:
    """Per contender the microseconds of one call less those of its floor in the same round."""
    rows, samples = [], laps.samples
    for name, floor in floors.items():
        values = [1e6 / CALLS * (t - f) for t, f in zip(samples[name], samples[floor], strict=True)]
        median, p20, p80 = (share(values, q) for q in (0.5, 0.2, 0.8))
        rows.append(Row("overhead", case, name, "us", median, p20, p80, len(values), {}, laps.others))
    return rows


@pytest.mark.parametrize("mode", ["no_grad", "grad", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_overhead(interleaved, record, benchmark, dtype, mode):
    grad = mode != "no_grad"
    x = torch.randn(1, FEATURES, dtype=dtype, requires_grad=grad)
    modules, w = layers(dtype), torch.randn(FEATURES, FEATURES, dtype=dtype)
    calls = {"F.linear": lambda: linear(x, w), "bare LoRA": arithmetic(x, grad)}
    calls |= {name: (lambda module=module: module(x)) for name, module in modules.items()}
    if mode == "backward":
        calls = {name: backward_too(call, dtype) for name, call in calls.items()}
    laps = interleaved({name: repeated(call, grad) for name, call in calls.items()}, seconds=6)
    floors = {name: "F.linear" if name == "nn.Linear" else "bare LoRA" for name in modules}
    what = {"no_grad": "forward without grad", "grad": "forward", "backward": "forward + backward"}[mode]
    rows = overheads(laps, floors, f"{what}, {'bf16' if dtype == torch.bfloat16 else 'fp32'}")
    benchmark.extra_info["rows"] = [vars(row) for row in rows]
    record(rows)
