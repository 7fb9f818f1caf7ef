"""PeftModels on fastlora's ops: dropout, gradient checkpointing and torch.compile."""

import copy

import peft
import pytest
import torch
from compilers import assert_all_as_accurate
from models import make_batch
from peft_models import make_peft, patched
from test_against_peft import fill, parameters, wrap
from torch import nn

import fastlora

# transformers renames its checkpointing from release to release; the old names work in all of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def visible_dropout(p=0.5, size=256):
    """A layer whose output is its input times the dropout mask."""
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    nn.init.zeros_(model[0].weight)
    layer = fastlora.patch(wrap(model, r=size, target_modules=["0"], lora_alpha=size, lora_dropout=p)).base_model.model[
        0
    ]
    nn.init.eye_(layer.lora_A["default"].weight)
    nn.init.eye_(layer.lora_B["default"].weight)
    return layer


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_drops_the_share_and_keeps_the_mean(p):
    layer = visible_dropout(p)
    x = torch.ones(400, 256, requires_grad=True)
    y = layer(x)
    kept = y != 0
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / y.numel()) ** 0.5, "five standard deviations"
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    assert not torch.equal(layer(x) != 0, kept), "a mask of its own in every call"
    assert torch.equal(layer.eval()(x), x)


def test_dropout_follows_the_seed_of_torch():
    layer, x = visible_dropout(), torch.ones(8, 256)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gradients_are_finite_differences(p):
    model = wrap(nn.Sequential(nn.Linear(9, 7).double()), r=2, target_modules=["0"], lora_dropout=p)
    layer = fastlora.patch(fill(model, 1)).train().base_model.model[0]

    def function(x, *weights):
        torch.manual_seed(3)
        return layer(x)

    weights = [p for p in layer.parameters() if p.requires_grad]
    assert {w.dtype for w in weights} == {torch.float64}
    assert torch.autograd.gradcheck(function, (torch.randn(5, 9, dtype=torch.float64, requires_grad=True), *weights))


def make_patched(p):
    return fastlora.patch(make_peft(lora_dropout=p)).train()


def step(model, call=None):
    """Logits and adapter gradients of a training step, with dropout of one seed."""
    model.zero_grad()
    torch.manual_seed(11)
    outputs = (model if call is None else call)(**make_batch())
    outputs.loss.backward()
    return {name: p.grad.clone() for name, p in parameters(model).items()} | {"logits": outputs.logits.detach()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_bit(reentrant):
    model = make_patched(0.2)
    expected = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert_equal(step(model), expected)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiles_without_a_graph_break(p):
    model = make_patched(p)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(step(model, compiled), step(model))
    exact = step(copy.deepcopy(model).double())
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_as_accurate(step(model, compiled), step(model), exact)


def test_a_compiled_model_follows_its_adapters():
    """A compiled graph must not outlive the adapter, the mode or the scaling that it was made for."""
    model = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8))
    model = fastlora.patch(fill(wrap(model, r=3, target_modules=["0", "2"], lora_dropout=0.2), 1)).train()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(6, 12)

    def check():
        results = []
        for forward in (compiled, model):
            torch.manual_seed(3)
            with torch.no_grad():
                results.append(forward(x))
        assert torch.equal(*results)
        return results[0]

    seen = [check()]
    model.set_adapter("second")
    seen.append(check())
    model.eval()
    model.set_adapter("default")
    seen.append(check())
    with model.disable_adapter():
        seen.append(check())
    for layer in patched(model):
        layer.scaling["default"] = 5.0
    seen.append(check())
    model.base_model.set_adapter(["default", "second"])
    seen.append(check())
    assert len({y.sum().item() for y in seen}) == len(seen)
