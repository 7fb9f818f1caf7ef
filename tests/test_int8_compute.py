"""`compute="int8"`: models whose int8 layers quantise their inputs, too."""

import copy
import math

import pytest
import torch
from models import make_batch, make_model

import fastlora
from fastlora.adapters.registry import lora_layers
from fastlora_kernels.reference import OUTLIER_THRESHOLD

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def make(**settings):
    model = fastlora.patch(make_model("llama"), r=4, targets=TARGETS, **{"quantize": "int8"} | settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


def thresholds(model):
    return {layer.threshold for layer in lora_layers(model).values()}


@torch.no_grad()
def logits(model, tokens=12):
    return model(input_ids=make_batch(tokens=tokens)["input_ids"]).logits


def step(model):
    loss = model(**make_batch(tokens=12)).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_quantises_inputs_where_there_are_many_tokens():
    model = make(compute="int8")
    with_codes, few = logits(model), logits(model, tokens=2)
    fastlora.set_compute(model, None)
    assert torch.equal(logits(model, tokens=2), few), "up to 16 tokens nothing changes"
    plain = logits(model)
    assert not torch.equal(with_codes, plain)
    # A code is off by at most half of a 127th of the largest element, and many of them add up.
    assert (with_codes - plain).norm() < 0.05 * plain.norm()
    fastlora.set_compute(model, "int8")
    assert torch.equal(logits(model), with_codes)


def test_trains():
    torch.manual_seed(0)
    model = make(compute="int8", dropout=0.1).train()
    loss, gradients = step(model)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients.values())
    other = copy.deepcopy(model)
    assert thresholds(other) == {OUTLIER_THRESHOLD}


def test_groups_compute_what_single_layers_do():
    model = make(compute="int8")
    alone = copy.deepcopy(model)
    fastlora.layers.dissolve_groups(alone)
    (loss, gradients), (expected_loss, expected) = step(model), step(alone)
    assert torch.equal(loss, expected_loss)
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-6) for name in expected)


def test_layers_that_differ_are_no_group():
    """q with codes, k and v without: each computes as it was told."""
    model = make(compute="int8")
    attention = model.model.layers[0].self_attn
    attention.k_proj.threshold = attention.v_proj.threshold = None
    alone = copy.deepcopy(model)
    fastlora.layers.dissolve_groups(alone)
    assert torch.equal(step(model)[0], step(alone)[0])


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = make(compute="int8")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = make_batch(tokens=12)
    assert torch.equal(compiled(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("settings", [dict(use_dora=True), dict(use_rslora=True), dict(lora_bias=True)], ids=str)
def test_other_settings(settings):
    config = fastlora.LoraConfig(r=4, target_modules=TARGETS, **settings)
    model = fastlora.patch(make_model("llama"), config=config, quantize="int8", compute="int8")
    with_codes = logits(model)
    fastlora.set_compute(model, None)
    plain = logits(model)
    assert not torch.equal(with_codes, plain)
    assert (with_codes - plain).norm() < 0.05 * plain.norm()


def test_merged_and_unmerged():
    model = make(compute="int8")
    before = logits(model)
    fastlora.merge(model)
    assert (logits(model) - before).norm() < 0.05 * before.norm()
    fastlora.unmerge(model)
    assert torch.equal(logits(model), before)


def test_unload_leaves_nothing():
    model = fastlora.unload(make(compute="int8"))
    assert not any("threshold" in module.__dict__ for module in model.modules())


def test_loads_and_adds(tmp_path):
    fastlora.save(make(), tmp_path)
    model = fastlora.load(make_model("llama"), tmp_path, quantize="int8", compute="int8")
    assert thresholds(model) == {OUTLIER_THRESHOLD}
    fastlora.patch(model, r=2, targets=TARGETS, adapter="more")
    assert thresholds(model) == {OUTLIER_THRESHOLD}, "another adapter leaves it as it is"


def test_says_so():
    words = {layer.computed_by() for layer in lora_layers(make(compute="int8")).values()}
    assert all("inputs of more than 16 tokens in int8" in word for word in words)


@pytest.mark.parametrize(("own", "expected"), [(6.0, 6.0), (3.5, 3.5), (0.0, math.inf)])
def test_threshold_of_bitsandbytes(own, expected):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False))
    layer = bitsandbytes.nn.Linear8bitLt(32, 24, bias=False, has_fp16_weights=False, threshold=own)
    layer.weight = bitsandbytes.nn.Int8Params(model[0].weight.data, requires_grad=False, has_fp16_weights=False)
    model[0] = layer.to("cpu")
    fastlora.patch(model, r=2, targets=["0"], compute="int8")
    assert model[0].threshold == expected


def test_as_accurate_as_bitsandbytes():
    """With planted outliers, against the product of the dense weight."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    weight, x = torch.randn(96, 256, dtype=torch.float16) / 16, torch.randn(64, 256, dtype=torch.float16)
    x[:, [7, 100, 200]] *= 20
    exact = x.double() @ weight.double().T
    theirs = bitsandbytes.nn.Linear8bitLt(256, 96, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    ours = torch.nn.Sequential(torch.nn.Linear(256, 96, bias=False, dtype=torch.float16))
    ours[0].weight.data.copy_(weight)
    fastlora.patch(ours, r=2, targets=["0"], quantize="int8", compute="int8")
    with torch.no_grad():
        errors = [(layer(x).double() - exact).square().mean() for layer in (ours, theirs.to("cpu").eval())]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(compute="int4", quantize="int8"), r"compute: expected one of \(None, 'int8'\), found 'int4'"),
        (dict(compute="int8", quantize=None), "compute: expected quantize='int8', or 8-bit layers of bitsandbytes"),
        (dict(compute="int8", targets=["embed_tokens"]), "compute: expected quantize='int8', or 8-bit layers"),
    ],
)
def test_refuses_before_anything_changes(settings, message):
    model = make_model("llama")
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fastlora.patch(model, **{"r": 4, "targets": TARGETS, "quantize": "int8"} | settings)
    assert list(model.state_dict()) == before


def test_set_compute_refuses():
    with pytest.raises(ValueError, match="model"):
        fastlora.set_compute(make_model("llama"), "int8")
    with pytest.raises(ValueError, match="compute: expected layers with int8 weights"):
        fastlora.set_compute(make(quantize=None), "int8")
    with pytest.raises(ValueError, match="compute: expected one of"):
        fastlora.set_compute(make(), "int4")
