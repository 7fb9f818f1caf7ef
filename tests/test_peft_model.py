"""PeftModels on fastlora's ops, beside unpatched copies of the same models."""

import contextlib
import copy

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model
from peft.tuners import lora
from test_against_peft import ADAPTERS, ALPHA, R, fill, flat, in_units_of, parameters, smooth, train, wrap
from torch import nn
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora import ops
from fastlora.integrations.peft import plan
from fastlora.integrations.peft_layers import FastLoraLinear

pytestmark = pytest.mark.filterwarnings("ignore:(fan_in_fan_out|.*checkpointing. is deprecated|Already found a)")

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NAMES = ["llama", "gpt2", "bert", "t5"]


def make_peft(name="llama", dtype=torch.float32, seed=0, **settings):
    """A PeftModel whose adapter does something."""
    settings = dict(r=R, lora_alpha=ALPHA, target_modules=MODELS[name][1]) | settings
    return fill(wrap(smooth(make_model(name, dtype)), **settings), seed)


def make_pair(name="llama", dtype=torch.float32, **settings):
    """A patched PeftModel and its unpatched twin."""
    twin = make_peft(name, dtype, **settings)
    return fastlora.patch(copy.deepcopy(twin)), twin


def patched(model):
    return [module for module in model.modules() if isinstance(module, FastLoraLinear)]


def verdicts(model):
    return {(verdict, reason if verdict == "fallback" else "") for _, verdict, reason in plan(model)}


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by one with every layer that an op computes."""
    made, op = [], ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *inputs: made.append(inputs) or op(*inputs))
    return made


@torch.no_grad()
def logits(model, **inputs):
    return model(**make_batch(), **inputs).logits


def assert_same_logits(ours, twin, **inputs):
    exact = copy.deepcopy(twin).double()
    assert_as_accurate_as_eager(*(logits(model.eval(), **inputs) for model in (ours, twin, exact)), "logits")


def run(kind, name, dtype):
    """What `train` gives under several adapters, by what it is."""
    runs = []
    for seed in range(ADAPTERS):
        model = make_peft(name, dtype, seed)
        model = model.double() if kind == "exact" else model if kind == "peft" else fastlora.patch(model)
        with ops.using("reference") if kind == "reference" else contextlib.nullcontext():
            runs.append(train(model.train(), make_batch(tokens=16, batch=8)))
    return {key: [run[key] for run in runs] for key in runs[0]}


@BOTH_DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_trains_as_accurately_as_eager(name, dtype):
    # In 16 bits PEFT computes its branch in float32, which is not what eager PyTorch in that dtype does.
    eager = run("peft" if dtype == torch.float32 else "reference", name, dtype)
    ours, exact = run("fastlora", name, dtype), run("exact", name, dtype)
    for key in ("logits", "trained logits"):
        assert_as_accurate_as_eager(flat(ours[key]), flat(eager[key]), flat(exact[key]), key)
    gradients = [flat(in_units_of(exact["gradients"], run["gradients"])) for run in (ours, eager, exact)]
    assert_as_accurate_as_eager(*gradients, "gradients")
    losses = [flat(run["trained losses"]).double() for run in (ours, eager, exact)]
    assert (losses[0].mean() - losses[2].mean()).abs() <= 2 * (losses[1] - losses[2]).square().mean().sqrt()
