"""Replacing an adapter's values in place, also under compiled code."""

import pytest
import torch
from models import make_batch, make_model

import fastlora

TARGETS = ["q_proj", "down_proj"]


def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(folder, seed, **settings):
    """The logits of an adapter that is then in the folder."""
    config = fastlora.LoraConfig(**dict(r=4, target_modules=TARGETS) | settings)
    model = fill(fastlora.patch(make_model("llama"), config=config), seed).eval()
    fastlora.save(model, folder)
    return logits(model)


def logits(model):
    with torch.no_grad():
        return model(**make_batch()).logits


def assert_same(found, expected):
    """Equal but for the rounding of a scaling that went into B."""
    assert (found - expected).abs().max() <= 16 * torch.finfo(found.dtype).eps * expected.abs().max()


@pytest.mark.parametrize(
    "settings",
    [{}, dict(r=2), dict(lora_alpha=3), dict(use_rslora=True), dict(target_modules=["q_proj"]),
     dict(rank_pattern={"q_proj": 1})],
    ids=str,
)  # fmt: skip
def test_equals_loading(tmp_path, settings):
    expected = saved(tmp_path, 1, **settings)
    model = fill(fastlora.patch(make_model("llama"), r=4, targets=TARGETS), 2).eval()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert fastlora.hotswap(model, tmp_path) is model
    assert_same(logits(model), expected)
    assert before == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_dora_too(tmp_path):
    settings = dict(use_dora=True)
    expected = saved(tmp_path, 1, **settings)
    config = fastlora.LoraConfig(r=4, target_modules=TARGETS, **settings)
    model = fill(fastlora.patch(make_model("llama"), config=config), 2).eval()
    assert_same(logits(fastlora.hotswap(model, tmp_path)), expected)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_compiled_code_stays(tmp_path, quantize):
    for seed in (1, 2, 3):
        saved(tmp_path / str(seed), seed, lora_alpha=8 * seed)
    model = fastlora.patch(make_model("llama"), r=4, targets=TARGETS, quantize=quantize).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2, 3):
            fastlora.hotswap(model, tmp_path / str(seed))
            assert torch.equal(logits(compiled), logits(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(r=8), "expected a rank of at most 4 for .*, found 8"),
        (dict(target_modules=["v_proj"]), "found some for .*v_proj"),
        (dict(lora_bias=True), r"found \['lora_A.weight', 'lora_B.bias'"),
        (dict(modules_to_save=["lm_head"]), "without trained modules"),
    ],
    ids=str,
)
def test_refuses(tmp_path, settings, message):
    saved(tmp_path, 1, **settings)
    model = fill(fastlora.patch(make_model("llama"), r=4, targets=TARGETS), 2).eval()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        fastlora.hotswap(model, tmp_path)
    with pytest.raises(ValueError, match="found 'other'"):
        fastlora.hotswap(model, tmp_path, "other")
    assert torch.equal(logits(model), before)
