"""Merging in memory: with and without the weights from before, in little memory, and all of it or nothing."""

import copy
import subprocess
import sys

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import make_batch, make_model
from torch import nn

import fastlora
from fastlora.layers import fold
from fastlora_kernels import reference


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 24, 16))


class Kinds(nn.Module):
    """One module of every kind that adapters go on; nothing here is called."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(40, 16)
        self.linear = nn.Linear(16, 24)
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.attention = nn.MultiheadAttention(16, 2)
        self.experts = Experts()
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.tokens.weight


ALL = ["tokens", "linear", "conv", "attention"]
SETTINGS = {
    "plain": dict(target_modules=ALL, target_parameters=["experts.up"]),
    "dora": dict(target_modules=["tokens", "linear", "conv"], use_dora=True),
    "biases": dict(target_modules=["linear", "conv"], lora_bias=True),
    "tokens": dict(target_modules=["linear"], trainable_token_indices={"tokens": [1, 5]}),
    "int8": dict(target_modules=["linear"]),
    "int8-dora": dict(target_modules=["linear"], use_dora=True),
}


def adapted(settings: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Kinds().to(dtype)
    quantize = "int8" if settings.startswith("int8") else None
    fastlora.patch(model, config=fastlora.LoraConfig(r=4, **SETTINGS[settings]), quantize=quantize)
    return filled(model)


def filled(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "token_rows")):
            nn.init.normal_(parameter, std=0.3)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of rows in the smallest weight, the last one ragged."""
    monkeypatch.setattr(fold, "CPU_BLOCK", 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
def test_without_the_base_the_bits_are_the_same(settings, dtype, small_blocks):
    model = adapted(settings, dtype)
    other, before = copy.deepcopy(model), state(model)
    kept, overwritten = state(fastlora.merge(model)), state(fastlora.merge(other, keep_base=False))
    assert_same(kept, overwritten)
    changed = {name for name in before if not torch.equal(before[name], kept[name])}
    assert "linear.weight" in changed
    assert_same(state(fastlora.unmerge(model)), before)


@pytest.mark.parametrize("settings", SETTINGS)
def test_blocks_change_no_bit(settings, monkeypatch):
    model = adapted(settings)
    other = copy.deepcopy(model)
    whole = state(fastlora.merge(model))
    monkeypatch.setattr(fold, "CPU_BLOCK", 100)
    assert_same(state(fastlora.merge(other)), whole)


def test_weights_are_written_over_where_nobody_shares_them():
    model = adapted("plain")
    addresses = {name: p.data_ptr() for name, p in model.named_parameters(remove_duplicate=False)}
    head = model.head.weight.detach().clone()
    fastlora.merge(model, keep_base=False)
    moved = {name for name, p in model.named_parameters(remove_duplicate=False) if p.data_ptr() != addresses[name]}
    assert moved == {"tokens.weight", "conv.weight"}  # the head has the same one; no matrix views this one's memory
    assert torch.equal(model.head.weight, head)


def test_shared_memory_is_not_written_over():
    """Views of one tensor in two parameters, and memory of other processes."""
    both = torch.randn(48, 16)
    model = nn.ModuleDict({"q": nn.Linear(16, 24), "k": nn.Linear(16, 24), "other": nn.Linear(16, 24)})
    model.q.weight, model.k.weight = nn.Parameter(both[:24]), nn.Parameter(both[24:])
    model.other.weight.data.share_memory_()
    shared, before = model.other.weight.data, both.clone()
    filled(fastlora.patch(model, r=4, targets=["q", "other"]))
    other_before = shared.clone()
    fastlora.merge(model, keep_base=False)
    assert torch.equal(both, before)
    assert torch.equal(shared, other_before)
    assert not torch.equal(model.q.weight, both[:24])
    assert not torch.equal(model.other.weight, shared)


@pytest.mark.parametrize("settings", ["plain", "int8", "dora"])
def test_what_needs_the_base_is_refused_without_it(settings):
    model = adapted(settings)
    fastlora.merge(model, keep_base=False)
    merged = state(model)
    for call in (fastlora.unmerge, fastlora.unload, lambda m: fastlora.disabled(m).__enter__()):
        with pytest.raises(ValueError, match="expected a merge that kept the weights from before"):
            call(model)
        assert_same(state(model), merged)
        assert all(layer.adapters_enabled for layer in model.modules() if hasattr(layer, "adapters_enabled"))
    weight = reference.dequantize_rows(model.linear.weight, model.linear.weight_scale, torch.float32)
    fastlora.unload(model, merge=True)
    assert type(model.linear) is nn.Linear
    assert torch.equal(model.linear.weight, weight)


def test_a_merged_model_can_let_go_of_the_base():
    model = fastlora.merge(adapted("plain"))
    merged = state(model)
    assert_same(state(fastlora.merge(model, keep_base=False)), merged)
    with pytest.raises(ValueError, match="keep_base=False"):
        fastlora.unmerge(model)


@pytest.mark.parametrize("merged", [False, True])
def test_a_disabled_model_is_not_merged(merged):
    """What is merged is out of its place there: letting go of the base would lose the merge."""
    model = adapted("plain")
    if merged:
        fastlora.merge(model)
    before = state(model)
    with fastlora.disabled(model):
        for keep_base in (True, False):
            with pytest.raises(ValueError, match="expected enabled adapters"):
                fastlora.merge(model, keep_base=keep_base)
    assert_same(state(model), before)


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize(("place", "value"), [("lora_A", float("nan")), ("lora_B", 3e38), ("weight", float("inf"))])
def test_nothing_is_merged_where_a_result_is_not_finite(place, value, keep_base):
    model = adapted("plain")
    fastlora.patch(model, r=2, targets=["linear"], adapter="second")
    fastlora.set_adapter(model, "second")
    parameter = model.conv.weight if place == "weight" else getattr(model.conv, place)["default"]
    parameter.data[(-1,) * parameter.dim()] = value
    model.conv.lora_A["default"].data += 10
    before = state(model)
    with pytest.raises(ValueError, match=r"conv: .*expected a finite merged weight"):
        fastlora.merge(model, ["default", "second"], keep_base=keep_base)
    assert all(
        torch.equal(p.nan_to_num(), before[n].nan_to_num()) for n, p in model.named_parameters(remove_duplicate=False)
    )
    assert model.linear.active_adapters == ("second",)
    with pytest.raises(ValueError, match="expected a finite merged weight"):
        fastlora.unload(copy.deepcopy(fastlora_active(model)), merge=True)


def fastlora_active(model: nn.Module) -> nn.Module:
    fastlora.set_adapter(model, "default")
    return model


def test_a_sum_near_the_limit_is_computed_to_know(small_blocks):
    """The bound on the sum is out of range here, and the sum is not."""
    model = nn.ModuleDict({"linear": nn.Linear(16, 24).half()})
    model.linear.weight.data.fill_(40000)
    fastlora.patch(model, r=1, targets=["linear"], alpha=1)
    nn.init.constant_(model.linear.lora_A["default"], -100.0)
    nn.init.constant_(model.linear.lora_B["default"], 300.0)
    fastlora.merge(model, keep_base=False)
    assert (model.linear.weight == 10000).all()


def test_progress_is_told_in_bytes():
    calls = []
    model = adapted("plain")
    fastlora.merge(model, progress=lambda done, total: calls.append((done, total)))
    weights = [model.tokens.weight, model.linear.weight, model.conv.weight, model.experts._parameters["up"]]
    weights += [model.attention._parameters["in_proj_weight"], model.attention.out_proj._parameters["weight"]]
    total = sum(weight.nbytes for weight in weights)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (total, total)


@pytest.mark.parametrize("progress", [None, True, False])
def test_no_bar_without_a_terminal(progress, capfd):
    fastlora.merge(adapted("plain"), progress=progress)
    assert "".join(capfd.readouterr()).strip() == ""


def test_twenty_times_on_int8():
    model = make_model("llama", torch.bfloat16).eval()
    filled(fastlora.patch(model, r=4, targets=["q_proj", "down_proj"], quantize="int8"))
    frozen, merged = state(model), state(fastlora.merge(model))
    assert not torch.equal(frozen["model.layers.0.mlp.down_proj.weight"], merged["model.layers.0.mlp.down_proj.weight"])
    for _ in range(20):
        assert_same(state(fastlora.unmerge(model)), frozen)
        assert_same(state(fastlora.merge(model)), merged)


@pytest.mark.parametrize("keep_base", [True, False])
def test_int8_is_the_merge_in_float32_quantised_once(keep_base):
    """Weights bit for bit, and so the logits: no error comes on top of that of quantising the float32 merge."""
    model = filled(fastlora.patch(make_model("llama"), r=4, targets=["q_proj", "down_proj"], quantize="int8")).eval()
    dense = fastlora.unload(copy.deepcopy(model), merge=True)
    fastlora.merge(model, keep_base=keep_base)
    for name, layer in model.named_modules():
        if getattr(layer, "weight_scale", None) is not None:
            exact = dense.get_submodule(name)
            codes, scale = reference.quantize_rows(exact.weight.detach())
            assert torch.equal(layer.weight, codes)
            assert torch.equal(layer.weight_scale, scale)
            exact.weight.data = reference.dequantize_rows(codes, scale, torch.float32)
    ids = make_batch()["input_ids"]
    with torch.no_grad():
        exact = copy.deepcopy(dense).double()(ids).logits
        assert_as_accurate_as_eager(model(ids).logits, dense(ids).logits, exact)


MEASURED = """
import gc, sys, torch, fastlora
from pathlib import Path
from torch import nn
keep_base, dora, int8 = (word == "True" for word in sys.argv[1:])

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024

def make(size):
    model = nn.ModuleList(nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(2))
    config = fastlora.LoraConfig(r=4, target_modules=["0", "1"], use_dora=dora)
    fastlora.patch(model, config=config, quantize="int8" if int8 else None)
    for layer in model:
        nn.init.normal_(layer.lora_B["default"])
    return model

fastlora.merge(make(1024), keep_base=keep_base)
model = make(4096)
weights = sum(layer.weight.nbytes for layer in model)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
before = resident("VmRSS")
fastlora.merge(model, keep_base=keep_base)
print(resident("VmHWM") - before, weights)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(("keep_base", "dora", "int8"), [
    (False, True, False), (True, False, False), (False, False, True),
])  # fmt: skip
def test_peak_memory(keep_base, dora, int8):
    """Two layers of 32 MiB, or of 16 in int8: beside what is kept, merging takes less than any copy of one of them."""
    command = [sys.executable, "-c", MEASURED, *map(str, (keep_base, dora, int8))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    rise, weights = map(int, result.stdout.split())
    assert weights == (32 << 20 if int8 else 64 << 20)
    assert rise - keep_base * weights < 16 << 20
