"""Layers that read the same tensor, computed together, against the same layers one by one."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from models import make_batch, make_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO, build, inputs

import fastlora
from fastlora import ops
from fastlora.layers.group import Group, Seat

# Two orders of one sum differ in the last digits of float64, two formulas in the first: half of the digits tell.
HALF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5


class Attention(nn.Module):
    """A parent whose calls of its members are the test's choice."""

    def __init__(self, calls):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(12, 12, dtype=torch.float64))
        self.calls = calls

    def forward(self, x):
        return self.calls(self, x.clone())


def fill(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def attention(calls, p=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(calls))  # whose class a pickle finds by name, as it does functions of this module
    return fill(fastlora.patch(model, r=3, targets=["q_proj", "k_proj", "v_proj"], dropout=p)).train()


def llama(dtype=torch.float64, **settings):
    config = fastlora.LoraConfig(**dict(r=4, lora_alpha=3, target_modules="all-linear", lora_dropout=0.2) | settings)
    return fill(fastlora.patch(make_model("llama", dtype), config=config)).train()


@pytest.fixture
def one_by_one(monkeypatch):
    """Calls a function with the groups switched off."""

    def call(function):
        with monkeypatch.context() as context:
            context.setattr(Seat, "output", lambda *_: None)
            return function()

    return call


@pytest.fixture
def made(monkeypatch):
    """How many layers each op has computed together, in order."""
    sizes, group_op = [], ops.lora_linear_group
    for name in ("lora_linear", "lora_linear_gated"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, **settings: sizes.append(1) or op(*args, **settings))
    monkeypatch.setattr(ops, "lora_linear_group", lambda x, ws, *args: sizes.append(len(ws)) or group_op(x, ws, *args))
    return sizes


def step(model, run=None):
    """Outputs and gradients, with dropout from one seed."""
    model.zero_grad()
    torch.manual_seed(11)
    outputs = model(**make_batch()).logits if run is None else run()
    outputs.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {
        "y": outputs.detach()
    }


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(HALF_THE_DIGITS)
        assert error <= HALF_THE_DIGITS, f"{name}: {error:.1e}"


def groups_of(model):
    return {id(m.seat.group): m.seat.group for m in model.modules() if getattr(m, "seat", None)}.values()


def assert_nothing_left(model):
    assert groups_of(model)
    assert all(not group.ahead for group in groups_of(model))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_computes_what_single_layers_compute(quantize, made, one_by_one):
    model = make_model("llama")
    fastlora.patch(model, r=4, targets="all-linear", dropout=0.2, quantize=quantize)
    fill(model.double()).train()
    found = step(model)
    assert made == [3, 1, 2, 1] * 2
    assert_nothing_left(model)
    assert_close(found, one_by_one(lambda: step(model)))
    assert made[8:] == [1] * 14


SETTINGS = {
    "other ranks": (dict(rank_pattern={"k_proj": 2, "up_proj": 7}), [3, 1, 2, 1]),
    "not all adapted": (dict(target_modules=["q_proj", "v_proj", "up_proj"]), [2, 1]),
    "one alone": (dict(target_modules=["k_proj"]), [1]),
    "bias trains": (dict(bias="lora_only"), [3, 1, 2, 1]),  # a Llama has none
    "DoRA": (dict(use_dora=True, lora_dropout=0.0), None),
    "bias of B": (dict(lora_bias=True), []),
}


@pytest.mark.parametrize(("settings", "sizes"), SETTINGS.values(), ids=SETTINGS.keys())
def test_other_settings(settings, sizes, made, one_by_one):
    model = llama(**settings)
    found = step(model)
    if sizes is not None:
        assert made == sizes * 2
    assert all(not group.ahead for group in groups_of(model))
    assert_close(found, one_by_one(lambda: step(model)))


def test_adapters_come_and_go(made, one_by_one):
    model = llama(lora_dropout=0.0)
    config = fastlora.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    fill(fastlora.patch(model, config=config, adapter="second")).eval()

    def logits():
        return model(**make_batch()).logits.detach()

    def check():
        del made[:]
        assert torch.equal(logits(), one_by_one(logits))

    check()
    assert made[:2] == [2, 2], "k computes its frozen weight alone"
    for names in ("default", ["default", "second"], "second"):
        fastlora.set_adapter(model, names)
        check()
    with fastlora.disabled(model):
        check()
    with fastlora.mixed(model, ["default", None]):
        check()
    fastlora.merge(model)
    check()
    fastlora.unmerge(model)
    fastlora.set_adapter(model, "default")
    check()
    assert made[:4] == [3, 1, 2, 1]
    fastlora.unload(model)
    assert not groups_of(model)
    assert not any(
        isinstance(getattr(h, "__self__", None), Group) for m in model.modules() for h in m._forward_hooks.values()
    )


def in_order(parent, x):
    return parent.q_proj(x) + parent.k_proj(x) * 2 + parent.v_proj(x) * 3


def other_order(parent, x):
    return parent.v_proj(x) * 3 + parent.q_proj(x) + parent.k_proj(x) * 2


def cross(parent, x):
    return parent.q_proj(x) + parent.k_proj(x.flip(0)) * 2 + parent.v_proj(x.flip(0)) * 3


def twice(parent, x):
    return parent.q_proj(x) + parent.q_proj(x) + parent.k_proj(x) + parent.v_proj(x)


def not_all(parent, x):
    return parent.q_proj(x) + parent.k_proj(x)


@pytest.mark.parametrize("calls", [in_order, other_order, cross, twice, not_all])
@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
def test_any_calls(calls, checkpointed, one_by_one):
    model, x = attention(calls, p=0.0), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)

    def run():
        return model(x) if checkpointed is None else checkpoint(model, x, use_reentrant=checkpointed)

    for _ in range(2):
        found = step(model, run)
        assert_nothing_left(model)
    (group,) = groups_of(model)
    assert group.kind.shares == (calls is in_order)
    assert_close(found, one_by_one(lambda: step(model, run)))


def test_a_checkpoint_does_again_what_it_did(made):
    """Also where, between a forward and its recomputation, another call shows that the members share nothing."""
    model, x = attention(in_order, p=0.0), torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=False)
    model[0].calls = cross
    model(x)
    assert not next(iter(groups_of(model))).kind.shares
    model[0].calls = in_order
    y.sum().backward()
    assert made == [3, 3, 1, 1, 3], "forward, cross attention that turns the group off, recomputation"


def changed_between(parent, x):
    y = parent.q_proj(x)
    x.add_(1)
    return y + parent.k_proj(x) * 2 + parent.v_proj(x) * 3


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_input_changed_between_calls(mode, one_by_one):
    model, x = attention(changed_between, p=0.0), torch.randn(5, 12, dtype=torch.float64)
    with mode():
        assert torch.equal(model(x), one_by_one(lambda: model(x)))


def test_an_error_leaves_nothing():
    def fail(parent, x):
        parent.q_proj(x)
        raise RuntimeError("out of memory")

    model = attention(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.randn(5, 12, dtype=torch.float64))
    assert_nothing_left(model)
    assert next(iter(groups_of(model))).kind.shares


def test_outside_of_the_parent_each_computes_by_itself(made):
    model, x = attention(in_order), torch.randn(5, 12, dtype=torch.float64)
    model[0].q_proj(x)
    model[0].forward(x)
    assert made == [1] * 4
    assert_nothing_left(model)


def test_hook_that_replaces_an_input(one_by_one):
    model, x = attention(in_order, p=0.0), torch.randn(5, 12, dtype=torch.float64)
    model[0].k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert torch.equal(model(x), one_by_one(lambda: model(x)))
    assert_nothing_left(model)


def test_hooks_on_gradients_run(one_by_one):
    """A full backward hook makes a new tensor of the input."""
    model, x, seen = attention(in_order, p=0.0), torch.randn(5, 12, dtype=torch.float64, requires_grad=True), []
    model[0].k_proj.register_full_backward_hook(lambda module, d_x, d_y: seen.append(d_x[0].clone()))
    found = step(model, lambda: model(x))
    assert_close(found, one_by_one(lambda: step(model, lambda: model(x))))
    assert len(seen) == 2
    assert_close({"d_x": seen[0]}, {"d_x": seen[1]})


def test_autocast(one_by_one):
    model = llama(torch.float32)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(**make_batch()).logits.float()

    torch.manual_seed(3)
    found = run()
    torch.manual_seed(3)
    assert torch.equal(found, one_by_one(run))


def test_threads_do_not_meet():
    model = attention(in_order, p=0.0)
    batches = [torch.randn(5, 12, dtype=torch.float64) for _ in range(4)]
    expected, wrong = [model(x) for x in batches], []

    def work(i):
        wrong.extend(i for _ in range(50) if not torch.equal(model(batches[i]), expected[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_nothing_left(model)
    assert next(iter(groups_of(model))).kind.shares


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_groups_of_their_own(clone, made):
    model, x = attention(in_order, p=0.0), torch.randn(5, 12, dtype=torch.float64)
    other = clone(model)
    with torch.no_grad():
        other[0].k_proj.weight.mul_(2)
    (group,), (its_group,) = groups_of(model), groups_of(other)
    assert group is not its_group
    assert [h.__self__ for h in other[0]._forward_hooks.values()] == [its_group]
    assert not torch.equal(model(x), other(x))
    assert made == [3, 3]
    fastlora.unload(other)
    assert not other[0]._forward_hooks
    assert model[0]._forward_hooks


def test_a_deleted_model_is_freed_at_once():
    model = attention(in_order)
    alive = weakref.ref(model[0].q_proj)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_names_tell_who_shares(name, one_by_one):
    """No architecture calls the members of a group with different tensors, or in another order."""
    model = fill(fastlora.patch(build(name), r=2, targets="all-linear", dropout=0.2)).train()

    def run():
        return model(**inputs(name)).logits

    found = step(model, run)
    assert_close(found, one_by_one(lambda: step(model, run)))
    assert all(group.kind.shares and not group.ahead for group in groups_of(model))
