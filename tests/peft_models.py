"""Tiny models of PEFT, patched and not."""

import copy

import torch
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model
from test_against_peft import ALPHA, R, fill, smooth, wrap

import fastlora
from fastlora.integrations.peft_layers import OnOps


def make_peft(name="llama", dtype=torch.float32, seed=0, **settings):
    """A PeftModel whose adapter does something."""
    settings = dict(r=R, lora_alpha=ALPHA, target_modules=MODELS[name][1]) | settings
    return fill(wrap(smooth(make_model(name, dtype)), **settings), seed)


def make_pair(name="llama", dtype=torch.float32, **settings):
    """A patched PeftModel and its unpatched twin."""
    twin = make_peft(name, dtype, **settings)
    return fastlora.patch(copy.deepcopy(twin)), twin


def patched(model):
    return [module for module in model.modules() if isinstance(module, OnOps)]


@torch.no_grad()
def logits(model, **inputs):
    return model(**make_batch(), **inputs).logits


def assert_same_logits(ours, twin, **inputs):
    """In evaluation; `ours` is as accurate as `twin`."""
    exact = copy.deepcopy(twin).double()
    assert_as_accurate_as_eager(*(logits(model.eval(), **inputs) for model in (ours, twin, exact)), "logits")
