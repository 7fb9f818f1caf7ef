"""Against the installed PEFT, every feature on every architecture, in float64: see `parity.py`."""

from pathlib import Path

import peft
import pytest
import torch
from parity import FEATURES, cells, table
from safetensors.torch import load_file
from zoo import ZOO, build, inputs

import fastlora
from fastlora.adapters.registry import lora_layers
from fastlora.adapters.trained import copies_of

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

# Two orders of one sum differ in the last digits of float64, two formulas in the first: half of the digits tell.
HALF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5


def config(name, feature):
    settings = dict(r=2, lora_alpha=3, target_modules=ZOO[name].targets)
    return settings | FEATURES[feature](ZOO[name])


def wrap(name, feature):
    model = build(name)
    torch.manual_seed(7)
    return peft.get_peft_model(model, peft.LoraConfig(**config(name, feature))).double().eval()


def patch(name, feature):
    model = build(name)
    torch.manual_seed(7)
    return fastlora.patch(model, config=fastlora.LoraConfig(**config(name, feature))).eval()


def trained(model, adapter="default"):
    """What trains with an adapter, by PEFT's name in the file."""
    if isinstance(model, peft.PeftModel):
        names = {name: name.replace(".modules_to_save", "") for name, _ in model.named_parameters()}
        by_name = dict(model.named_parameters())
        found = {key.replace(f".{adapter}", ""): by_name[name] for name, key in names.items()}
        found = {key: parameter for key, parameter in found.items() if parameter.requires_grad}
        return {key.replace("magnitude_vector.weight", "magnitude_vector"): p for key, p in found.items()}
    layers = lora_layers(model)
    found = {f"{path}.{part}": p for path, layer in layers.items() for part, p in layer.parts(adapter).items()}
    for name, parameter in copies_of(model, adapter).items():
        path, _, attribute = name.rpartition(".")
        found[f"{path}.base_layer.{attribute}" if path in layers else name] = parameter
    return {f"base_model.model.{name}": parameter for name, parameter in found.items()}


def shake(model):
    """Random changes to everything that trains, the same for every model of one architecture."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(trained(model).items()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def logits(model, name):
    with torch.no_grad():
        return model(**inputs(name)).logits


def assert_close(found, expected, what, least=0.0):
    """Args: least: what counts as no less than zero: some gradients are sums that cancel out."""
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(least)
    assert error <= HALF_THE_DIGITS, f"{what}: relative error {error:.1e}"


def loss(model, name):
    return model(**inputs(name)).logits.square().mean()


def train(model, name, steps=5):
    weights = list(trained(model).values())
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, name).backward()
        optimizer.step()
    return model


@pytest.fixture(params=cells(), ids=lambda cell: "-".join(cell))
def cell(request):
    return request.param


def test_draws_what_peft_draws(cell):
    ours, theirs = trained(patch(*cell)), trained(wrap(*cell))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if "magnitude" in key:  # two ways to the same norm
            assert_close(ours[key], value, key)
        else:
            assert torch.equal(ours[key], value), key


def test_computes_what_peft_computes(cell):
    name = cell[0]
    ours, theirs = shake(patch(*cell)), shake(wrap(*cell))
    assert_close(logits(ours, name), logits(theirs, name), "logits")
    for model in (ours, theirs):
        loss(model, name).backward()
    expected = trained(theirs)
    least = HALF_THE_DIGITS * max(p.grad.abs().max() for p in expected.values() if p.grad is not None)
    for key, parameter in trained(ours).items():
        if expected[key].grad is None:
            assert parameter.grad is None, key
        else:
            assert_close(parameter.grad, expected[key].grad, f"gradient of {key}", least)
    assert_close(logits(train(ours, name), name), logits(train(theirs, name), name), "logits after training")


def test_files_go_both_ways(cell, tmp_path):
    name = cell[0]
    ours, theirs = shake(patch(*cell)), shake(wrap(*cell))
    fastlora.save(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    for key, value in trained(ours).items():
        assert torch.equal(value, files[0][key]), key
    loaded = fastlora.load(build(name), tmp_path / "theirs").eval()
    assert all(torch.equal(value, files[1][key]) for key, value in trained(loaded).items())
    assert_close(logits(loaded, name), logits(theirs, name), "their file")
    loaded = (
        peft.PeftModel.from_pretrained(build(name), tmp_path / "ours", autocast_adapter_dtype=False).double().eval()
    )
    assert_close(logits(loaded, name), logits(ours, name), "our file")


def test_merges_switches_and_comes_off(cell):
    name = cell[0]
    plain = logits(build(name), name)
    model = shake(patch(*cell))
    before, weights = logits(model, name), {key: value.clone() for key, value in model.state_dict().items()}
    fastlora.merge(model)
    assert_close(logits(model, name), before, "merged")
    fastlora.unmerge(model)
    assert torch.equal(logits(model, name), before)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in weights.items())
    with fastlora.disabled(model):
        assert torch.equal(logits(model, name), plain)
    fastlora.patch(model, config=fastlora.LoraConfig(**config(*cell)), adapter="second").eval()
    assert_close(logits(model, name), plain, "a second adapter, at first")
    fastlora.set_adapter(model, "default")
    assert torch.equal(logits(model, name), before)
    fastlora.unload(model)
    assert torch.equal(logits(model, name), plain)
    assert [type(module) for module in model.modules()] == [type(module) for module in build(name).modules()]


@pytest.mark.parametrize(
    ("name", "task"), [("roberta", "SEQ_CLS"), ("distilbert", "SEQ_CLS"), ("deberta-v2", "TOKEN_CLS")]
)
def test_heads_of_a_task_train_unasked(name, task, tmp_path):
    settings = dict(r=2, target_modules=ZOO[name].targets, task_type=task)
    first, second = build(name), build(name)
    torch.manual_seed(7)
    ours = shake(fastlora.patch(first, config=fastlora.LoraConfig(**settings)).eval())
    torch.manual_seed(7)
    theirs = shake(peft.get_peft_model(second, peft.LoraConfig(**settings)).double().eval())
    assert trained(ours).keys() == trained(theirs).keys()
    assert any("classifier" in key for key in trained(ours))
    assert_close(logits(ours, name), logits(theirs, name), "logits")
    fastlora.save(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = fastlora.load(build(name), tmp_path / "theirs").eval()
    assert_close(logits(loaded, name), logits(theirs, name), "their file")
    loaded = (
        peft.PeftModel.from_pretrained(build(name), tmp_path / "ours", autocast_adapter_dtype=False).double().eval()
    )
    assert_close(logits(loaded, name), logits(ours, name), "our file")


def test_the_table_in_the_docs():
    """It says which cells are run, and these are all."""
    assert (Path(__file__).parent.parent / "docs" / "parity.md").read_text() == table()
