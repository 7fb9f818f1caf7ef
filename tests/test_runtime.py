"""What a user does with a model: patch, train, switch, merge, undo, save, load."""

import copy
import itertools

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model
from torch import nn

import fastlora
from fastlora import ops
from fastlora.adapters.registry import adapters, lora_layers
from fastlora_kernels import reference

KINDS = list(itertools.product(["llama", "gpt2"], [None, "int8"]))


def randomised(model, adapter="default"):
    """Gives B values, as training would, so that the adapter changes the output."""
    generator = torch.Generator().manual_seed(7)
    for layer in lora_layers(model).values():
        if adapter in layer.lora_B:
            b = layer.lora_B[adapter].data
            b.copy_(torch.randn(b.shape, generator=generator) / 10)
    return model


def patched(name="llama", quantize=None, dtype=torch.float32, **arguments):
    model = make_model(name, dtype)
    return randomised(fastlora.patch(model, r=4, targets=MODELS[name][1], quantize=quantize, **arguments)).eval()


@torch.no_grad()
def logits(model):
    return model(**make_batch()).logits


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_patch_freezes_all_but_the_adapters(name):
    model = make_model(name)
    assert fastlora.patch(model, r=4) is model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    trainable, total = fastlora.trainable_parameters(model)
    assert 0 < trainable < total
    model(**make_batch()).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_fresh_adapter_changes_nothing():
    model = make_model("llama").eval()
    before = logits(model)
    assert torch.equal(logits(fastlora.patch(model, targets="all-linear")), before)


def test_modules_keep_their_identity_and_hooks():
    model = make_model("llama")
    projection = model.model.layers[0].self_attn.q_proj
    calls = []
    projection.register_forward_hook(lambda *_: calls.append(1))
    fastlora.patch(model, targets=["q_proj"])
    assert model.model.layers[0].self_attn.q_proj is projection
    assert isinstance(projection, nn.Linear)
    logits(model)
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "quantize"), KINDS)
def test_merge_and_unmerge_restore_every_bit(name, quantize, dtype):
    model = patched(name, quantize, dtype)
    frozen, before = bits(model), logits(model)
    for _ in range(3):
        fastlora.merge(model)
        merged = bits(model)
        assert any(not torch.equal(merged[key], frozen[key]) for key in frozen)
        assert fastlora.merge(model) is model  # merging twice is merging once
        assert_same_bits(bits(model), merged)
        fastlora.unmerge(model)
        assert_same_bits(bits(model), frozen)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_weight_is_the_rounded_sum(name):
    for quantize, dtype in [(None, torch.bfloat16), (None, torch.float32), ("int8", torch.bfloat16)]:
        model = patched(name, quantize, dtype)
        expected = {}
        for path, layer in lora_layers(model).items():
            a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
            frozen = layer.frozen_weight.detach()
            expected[path] = reference.merge_rows(frozen, layer.weight_scale, a, b, layer.scaling["default"])
        fastlora.merge(model)
        for path, layer in lora_layers(model).items():
            assert torch.equal(layer.frozen_weight, expected[path][0])
            if quantize:
                assert torch.equal(layer.weight_scale, expected[path][1])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_merged_model_agrees(name):
    model = patched(name)
    exact = logits(copy.deepcopy(model).double())
    with ops.using("reference"):
        eager = logits(model)
    assert_as_accurate_as_eager(logits(fastlora.merge(model)), eager, exact, "merged logits")


@pytest.mark.parametrize("merge_first", [False, True])
@pytest.mark.parametrize(("name", "quantize"), KINDS)
def test_disabled_is_the_frozen_model(name, quantize, merge_first):
    model = make_model(name).eval()
    fastlora.patch(model, r=4, targets=MODELS[name][1], quantize=quantize)
    base = logits(model)
    with_adapter = logits(randomised(model))
    assert not torch.equal(with_adapter, base)
    if merge_first:
        with_adapter = logits(fastlora.merge(model))
    with fastlora.disabled(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_adapter)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unload_undoes_patch(name, merged):
    original = make_model(name)
    model = patched(name)
    if merged:
        fastlora.merge(model)
    assert fastlora.unload(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in original.modules()]
    assert_same_bits(bits(model), bits(original))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("name", "quantize"), KINDS)
def test_unload_with_merge(name, quantize, merged):
    model = patched(name, quantize)
    exact = logits(copy.deepcopy(model).double())
    with ops.using("reference"):
        eager = logits(model)
    if merged:
        fastlora.merge(model)
    fastlora.unload(model, merge=True)
    assert [type(m) for m in model.modules()] == [type(m) for m in make_model(name).modules()]
    assert_as_accurate_as_eager(logits(model), eager, exact, "logits")


def test_two_adapters():
    model = patched(adapter="first")
    first = logits(model)
    fastlora.patch(model, r=2, targets=["o_proj", "q_proj"], adapter="second")
    with fastlora.disabled(model):
        base = logits(model)
    assert torch.equal(logits(model), base)
    fastlora.set_adapter(model, "first")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match=r"expected one of \['first', 'second'\], found 'third'"):
        fastlora.set_adapter(model, "third")


@pytest.mark.parametrize(("name", "quantize"), KINDS)
def test_save_and_load(name, quantize, tmp_path):
    model = patched(name, quantize)
    fastlora.save(model, tmp_path)
    fresh = make_model(name).eval()
    assert fastlora.load(fresh, tmp_path, quantize=quantize) is fresh
    assert torch.equal(logits(fresh), logits(model))
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_save_and_load_several(tmp_path):
    model = patched()
    randomised(fastlora.patch(model, r=2, targets=["o_proj"], adapter="other"), "other")
    fastlora.save(model, tmp_path)
    again = fastlora.load(make_model("llama").eval(), tmp_path, trainable=True)
    fastlora.load(again, tmp_path / "other", adapter="renamed")
    assert list(adapters(again)) == ["default", "renamed"]
    assert torch.equal(logits(again), logits(model))
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, _ in again.named_parameters() if name.endswith(".default")
    }


def test_copies_are_independent():
    model = patched(quantize="int8")
    twin = copy.deepcopy(model)
    fastlora.merge(twin)
    fastlora.unload(model)
    assert adapters(twin)
    assert not adapters(model)
    fresh = patched(quantize="int8")
    fresh.load_state_dict(fastlora.unmerge(twin).state_dict())
    assert torch.equal(logits(fresh), logits(twin))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_autocast(quantize):
    model = patched(quantize=quantize)
    with torch.autocast("cpu", torch.bfloat16):
        layer = model.model.layers[0].self_attn.q_proj
        y = layer(torch.randn(3, 48))
        loss = model(**make_batch()).loss
    assert y.dtype == torch.bfloat16
    loss.backward()
    assert layer.lora_A["default"].grad.dtype == torch.float32


def saved_for_backward(call):
    """The tensors that autograd keeps, without parameters."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call()
    return [t for t in kept if not isinstance(t, nn.Parameter) and t.dtype != torch.int8]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_saved_for_backward_is_x_s_and_the_seed(quantize):
    layer = patched(quantize=quantize, dropout=0.3).train().model.layers[0].self_attn.q_proj
    x = torch.randn(5, 48, requires_grad=True)
    kept = saved_for_backward(lambda: layer(x))
    scales = [layer.weight_scale] if quantize else []
    shapes = sorted(tuple(t.shape) for t in kept if not any(t is scale for scale in scales))
    assert shapes == [(1,), (5, 4), (5, 48)]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_a_frozen_first_layer_computes_no_input_gradient(monkeypatch):
    asked = []
    room = ops.implementation(torch.ones(1))
    original = room.lora_linear_backward
    monkeypatch.setattr(room, "lora_linear_backward", lambda *a: asked.append(a[-3:]) or original(*a))
    model = fastlora.patch(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), r=2, targets="all-linear")
    model(torch.randn(3, 6)).sum().backward()
    assert asked == [(True, True, True), (False, True, True)]


def test_inference_mode_first():
    """What a first call in inference mode leaves behind serves training too."""
    for tokens in (2, 20):
        layer = patched(quantize="int8").bfloat16().model.layers[0].self_attn.q_proj
        x = torch.randn(tokens, 48, dtype=torch.bfloat16)
        with torch.inference_mode():
            first = layer(x)
        y = layer(x.requires_grad_())
        y.sum().backward()
        assert torch.equal(y, first)


def test_generation():
    model = patched(quantize="int8")
    ids = make_batch()["input_ids"]
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
