"""LoRA+ beside PEFT's, and LoRA-FA: the groups, what trains, and what is kept for the backward."""

import peft
import pytest
import torch
from models import MODELS, make_batch, make_model
from peft.optimizers import create_loraplus_optimizer
from test_bad_input import refused
from torch import nn

import fastlora
from fastlora.adapters.registry import lora_layers

# What PEFT says of settings that are meant here, and of what it reads from transformers.
pytestmark = pytest.mark.filterwarnings("ignore:(fan_in_fan_out|.*gradient_checkpointing.* is deprecated)")


def patched(name="llama", dtype=torch.float32, **arguments):
    return fastlora.patch(make_model(name, dtype), r=4, targets=MODELS[name][1], **arguments)


# LoRA+


def named_groups(model, groups):
    """Learning rate and decay by parameter name, as PEFT names them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    strip = lambda name: name.removeprefix("base_model.model.").removesuffix(".weight")  # noqa: E731
    return {strip(names[id(p)]): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("name", MODELS)
def test_loraplus_groups_are_those_of_peft(name):
    wrapped = peft.get_peft_model(make_model(name), peft.LoraConfig(r=4, target_modules=MODELS[name][1]))
    theirs = create_loraplus_optimizer(
        wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    model = patched(name)
    ours = torch.optim.AdamW(fastlora.loraplus_groups(model, 1e-3, ratio=8.0, weight_decay=0.1))
    assert named_groups(model, ours.param_groups) == named_groups(wrapped, theirs.param_groups)
    assert {lr for lr, _ in named_groups(model, ours.param_groups).values()} == {1e-3, 8e-3}


def test_loraplus_groups_hold_everything_that_trains():
    model = patched()
    model.model.norm.weight.requires_grad_(True)
    model.model.embed_tokens.weight.requires_grad_(True)
    model.lm_head.weight.requires_grad_(True)
    lora_layers(model)["model.layers.0.self_attn.q_proj"].lora_A["default"].requires_grad_(False)
    plain = named_groups(model, fastlora.loraplus_groups(model, 0.5, ratio=4.0, weight_decay=0.1))
    assert plain.keys() == {n.removesuffix(".weight") for n, p in model.named_parameters() if p.requires_grad}
    assert plain["model.norm"] == (2.0, 0.0)
    assert plain["model.embed_tokens"] == plain["lm_head"] == (0.5, 0.1)
    apart = named_groups(model, fastlora.loraplus_groups(model, 0.5, ratio=4.0, weight_decay=0.1, embedding_lr=0.01))
    assert apart == plain | {"model.embed_tokens": (0.01, 0.1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(dict(lr=-1.0), "lr: .*found -1.0"), (dict(lr=float("nan")), "lr: .*found nan"),
     (dict(lr=1.0, ratio=-2.0), "ratio: "), (dict(lr=1.0, weight_decay=-2.0), "weight_decay: "),
     (dict(lr=1.0, embedding_lr=-2.0), "embedding_lr: ")],
)  # fmt: skip
def test_loraplus_refuses(arguments, message):
    model = patched()
    refused(model, message, lambda: fastlora.loraplus_groups(model, **arguments))


def test_loraplus_refuses_a_frozen_model():
    model = patched().requires_grad_(False)
    refused(model, "expected parameters that train, found none", lambda: fastlora.loraplus_groups(model, 1e-3))


# LoRA-FA


def saved_for_backward(call):
    """The tensors that autograd keeps, by storage, without parameters."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        result = call()
    return [t for t in kept.values() if not isinstance(t, nn.Parameter)], result


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_frozen_a_keeps_no_input(quantize, dropout):
    model = patched(quantize=quantize, dropout=dropout).train()
    layer = lora_layers(model)["model.layers.0.mlp.down_proj"]
    x = torch.randn(5, 80, requires_grad=True)
    shapes = [tuple(t.shape) for t in saved_for_backward(lambda: layer(x))[0]]
    assert (5, 80) in shapes
    assert fastlora.freeze_a(model) is model
    kept, y = saved_for_backward(lambda: layer(x))
    shapes = [tuple(t.shape) for t in kept]
    assert (5, 80) not in shapes
    assert (5, 4) in shapes
    y.sum().backward()
    assert x.grad is not None
    assert layer.lora_A["default"].grad is None
    assert layer.lora_B["default"].grad.any()


def test_freeze_a_of_one_adapter():
    model = fastlora.patch(patched(), r=2, targets=["q_proj", "o_proj"], adapter="second")
    fastlora.freeze_a(model, "second")
    frozen = {n for n, p in model.named_parameters() if "lora_" in n and not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.endswith("lora_A.second")}
    refused(model, r"expected one of \['default', 'second'\], found 'third'", lambda: fastlora.freeze_a(model, "third"))
    plain = make_model("llama")
    refused(plain, "expected one that was patched", lambda: fastlora.freeze_a(plain))


@pytest.mark.parametrize("recipe", ["loraplus", "loraplus-fa"])
def test_recipes_train(recipe):
    model = patched()
    if recipe == "loraplus-fa":
        fastlora.freeze_a(model)
    a = {n: p.clone() for n, p in model.named_parameters() if "lora_A" in n}
    losses = train(model, torch.optim.AdamW(fastlora.loraplus_groups(model, 1e-3)))
    assert losses[-1] < losses[0]
    moved = {n: not torch.equal(p, a[n]) for n, p in model.named_parameters() if n in a}
    assert set(moved.values()) == {recipe == "loraplus"}


def train(model, optimizer, steps=6):
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**make_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_attention_has_two_of_each():
    """The adapter of the output projection counts, too."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    fastlora.patch(model, r=2, targets=["attention"])
    groups = {group["lr"]: group["params"] for group in fastlora.loraplus_groups(model, lr=1.0, ratio=4.0)}
    assert sorted(len(members) for members in groups.values()) == [2, 2]
    assert [p.shape[1] for p in groups[4.0]] == [2, 2]
    fastlora.freeze_a(model)
    assert all(p.shape[1] == 2 for p in model.parameters() if p.requires_grad)
