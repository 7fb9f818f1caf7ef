"""Gated MLPs keep two of four wide tensors for their backward, and compute the same bits."""

import copy
import pickle

import pytest
import torch
from models import make_batch, make_model
from torch import nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import fastlora
from fastlora.layers import dissolve_gated
from fastlora.layers.gated import GatedMLP

TINY = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, pad_token_id=0,
)  # fmt: skip
MODELS = {
    "llama": lambda: make_model("llama"),
    "qwen2": lambda: make_model("qwen2"),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TINY)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**TINY, head_dim=12)),
}


def patched(make=MODELS["llama"], targets="all-linear", **settings):
    model = fastlora.patch(make(), r=4, targets=targets, **{"dropout": 0.1} | settings).train()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def ungated(model):
    """A copy whose MLPs are what they were."""
    alone = copy.deepcopy(model)
    dissolve_gated(alone)
    assert not gated(alone)
    return alone


def gated(model):
    return [module for module in model.modules() if isinstance(module, GatedMLP)]


def step(model, autocast=False):
    torch.manual_seed(5)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**make_batch(tokens=9)).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(model, other, **settings):
    found, expected = step(model, **settings), step(other, **settings)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def mlp(targets=("gate_proj", "up_proj", "down_proj"), **settings):
    """One MLP by itself, patched."""
    model = nn.ModuleDict({"mlp": LlamaMLP(LlamaConfig(**TINY))})
    fastlora.patch(model, r=4, targets=list(targets), **settings)
    return model


def kept(module, x):
    """Elements of each tensor that a forward keeps for its backward, weights left out; each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found = {}

    def keep(tensor):
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            found[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(x)
    return sorted(tensor.numel() for tensor in found.values()), output


@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name):
    model = patched(MODELS[name])
    assert len(gated(model)) == 2
    assert_same(model, ungated(model))


@pytest.mark.parametrize(
    "settings",
    [dict(quantize="int8"), dict(quantize="int8", compute="int8"), dict(dropout=0.0), dict(targets=["down_proj"])],
    ids=str,
)
def test_same_bits_with_other_settings(settings):
    model = patched(**settings)
    assert_same(model, ungated(model))


def test_same_bits_under_autocast():
    model = patched()
    assert_same(model, ungated(model), autocast=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_same_bits_under_checkpointing(reentrant):
    model = patched()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, ungated(model))


def test_same_bits_in_bfloat16():
    model = patched(lambda: make_model("llama").bfloat16())
    assert_same(model, ungated(model))


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = patched(dropout=0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = make_batch(tokens=9)
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def test_keeps_gate_and_up_alone():
    tokens, hidden, wide, rank = 40, TINY["hidden_size"], TINY["intermediate_size"], 4
    model, x = mlp(), torch.randn(1, tokens, hidden, requires_grad=True)
    found, _ = kept(model["mlp"], x)
    assert found == sorted([tokens * hidden, tokens * wide, tokens * wide, *[tokens * rank] * 3])
    dissolve_gated(model)
    before, _ = kept(model["mlp"], x)
    assert before == sorted([*found, tokens * wide, tokens * wide])


def test_without_gradients_and_without_adapters():
    model = patched(dropout=0.0)
    other = ungated(model)
    ids = make_batch(tokens=9)["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    for change in (lambda m: fastlora.disabled(m), lambda m: fastlora.mixed(m, ["default", None])):
        with change(model), change(other):
            assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    for one in (model, other):
        fastlora.merge(one)
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_what_is_hooked_sees_every_call():
    """A hook on the last layer, or on the activation, is given what it would be without this."""
    model = mlp()
    x, seen = torch.randn(1, 5, 48, requires_grad=True), []
    expected = model["mlp"](x)
    for name in ("down_proj", "act_fn"):
        module = model["mlp"].get_submodule(name)
        handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
        assert torch.equal(model["mlp"](x), expected)
        handle.remove()
    assert seen == [80, 80]
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    model["mlp"](x)
    handle.remove()
    assert type(model["mlp"].act_fn) in seen


class WithAnythingBetween(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.5)


class Reordered(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


@pytest.mark.parametrize("kind", [WithAnythingBetween, Reordered])
def test_another_forward_stays(kind):
    model = nn.ModuleDict({"mlp": kind(LlamaConfig(**TINY))})
    fastlora.patch(model, r=4, targets=["down_proj"])
    assert type(model["mlp"]) is kind


def test_an_mlp_without_an_adapter_at_its_end_stays():
    assert type(mlp(targets=["gate_proj"])["mlp"]) is LlamaMLP


def test_another_activation_is_not_computed_twice():
    class Counting(nn.SiLU):
        calls = 0

        def forward(self, x):
            Counting.calls += 1
            return super().forward(x)

    model = mlp()
    model["mlp"].act_fn = Counting()
    model["mlp"](torch.randn(1, 5, 48, requires_grad=True)).sum().backward()
    assert Counting.calls == 1


def test_unload_gives_the_class_back():
    model = fastlora.unload(patched())
    assert {type(module).__name__ for module in model.modules() if "MLP" in type(module).__name__} == {"LlamaMLP"}


def test_survives_a_pickle():
    model = mlp()
    other = pickle.loads(pickle.dumps(model["mlp"]))  # of our own making
    assert type(other) is type(model["mlp"])
    x = torch.randn(1, 5, 48, requires_grad=True)
    assert torch.equal(other(x), model["mlp"](x))


def test_4_bits_stay_bitsandbytes():
    """Its last layer multiplies by itself, with no dense weight to keep."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = nn.ModuleDict({"mlp": LlamaMLP(LlamaConfig(**TINY))})
    model["mlp"].down_proj = bitsandbytes.nn.Linear4bit(80, 48, bias=False).to("cpu")
    fastlora.patch(model, r=4, targets=["down_proj"])
    assert type(model["mlp"]) is LlamaMLP
