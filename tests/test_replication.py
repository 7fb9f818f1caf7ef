"""Repeated layers: beside PEFT, and back."""

import copy

import peft
import pytest
import torch
from models import make_batch
from test_parity import HALF_THE_DIGITS, assert_close, logits, loss, shake, trained
from zoo import ZOO, build

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore")

RANGES = [[0, 2], [0, 1], [1, 2], [1, 2]]
NAMES = ["llama", "bert", "falcon", "qwen2"]


def settings(name):
    return dict(r=2, lora_alpha=3, target_modules=ZOO[name].targets, layer_replication=RANGES)


def patch(name):
    model = build(name)
    torch.manual_seed(7)
    return fastlora.patch(model, config=fastlora.LoraConfig(**settings(name))).eval()


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_as_in_peft(name, tmp_path):
    ours, base = shake(patch(name)), build(name)
    torch.manual_seed(7)
    theirs = shake(peft.get_peft_model(base, peft.LoraConfig(**settings(name))).double().eval())
    assert trained(ours).keys() == trained(theirs).keys()
    assert_close(logits(ours, name), logits(theirs, name), "logits")
    for model in (ours, theirs):
        loss(model, name).backward()
    expected = trained(theirs)
    for key, parameter in trained(ours).items():
        assert_close(parameter.grad, expected[key].grad, key, HALF_THE_DIGITS * expected[key].abs().max())
    fastlora.save(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_close(logits(fastlora.load(build(name), tmp_path / "theirs").eval(), name), logits(theirs, name), "theirs")
    loaded = (
        peft.PeftModel.from_pretrained(build(name), tmp_path / "ours", autocast_adapter_dtype=False).double().eval()
    )
    assert_close(logits(loaded, name), logits(ours, name), "ours")


@pytest.mark.parametrize("name", NAMES)
def test_repeats_share_the_frozen_weights_alone(name):
    plain = build(name)
    model = patch(name)
    adapters = sum(p.numel() for p in trained(model).values())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + adapters
    assert model.config.num_hidden_layers == 5


@pytest.mark.parametrize("name", NAMES)
def test_comes_off(name):
    plain = build(name)
    model = build(name)
    frozen = next(model.parameters()).requires_grad_(False)
    fastlora.patch(model, config=fastlora.LoraConfig(**settings(name)))
    fastlora.unload(model)
    assert model.config.num_hidden_layers == plain.config.num_hidden_layers
    assert torch.equal(logits(model, name), logits(plain, name))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [next(plain.named_parameters())[0]]
    assert frozen is next(model.parameters())


def test_merged_repeats_are_apart():
    model = shake(patch("llama"))
    expected = logits(model, "llama")
    merged = fastlora.unload(copy.deepcopy(model), merge=True)
    assert_close(logits(merged, "llama"), expected, "merged")
    assert len(merged.model.layers) == 5
    fastlora.merge(model)
    assert_close(logits(model, "llama"), expected, "merged in place")
    fastlora.unmerge(model)
    assert torch.equal(logits(model, "llama"), expected)


def test_generates_with_a_cache():
    model = shake(patch("llama")).float()
    ids = make_batch(batch=1)["input_ids"] % 60 + 2
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with_cache, without = (model.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("ranges", [[[0, 9]], [[1, 1]], [[0]], [["a", 1]]], ids=str)
def test_refuses_ranges(ranges):
    model = build("llama")
    config = fastlora.LoraConfig(target_modules=["q_proj"], layer_replication=ranges)
    with pytest.raises(ValueError, match="layer_replication: expected ranges"):
        fastlora.patch(model, config=config)
    assert len(model.model.layers) == 2


def test_failure_leaves_the_layers():
    model = build("llama")
    layers = model.model.layers
    with pytest.raises(ValueError, match="targets"):
        fastlora.patch(model, config=fastlora.LoraConfig(target_modules=["nothing"], layer_replication=RANGES))
    assert model.model.layers is layers
    assert model.config.num_hidden_layers == 2
    fastlora.patch(model, r=2, targets=["q_proj"])
    with pytest.raises(ValueError, match="without adapters"):
        fastlora.patch(
            model, config=fastlora.LoraConfig(target_modules=["q_proj"], layer_replication=RANGES), adapter="second"
        )
