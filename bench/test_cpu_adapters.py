"""What many adapters on one model cost: a batch whose rows use different ones, and switching between them."""

from __future__ import annotations

import peft
import pytest
import torch
from contenders import NATIVE, TARGETS, base, make_ids
from torch import nn

import fastlora

pytestmark = pytest.mark.cpu
COUNT, ROWS, TOKENS, RANK = 64, 8, 64, 16
NAMES = [f"a{i}" for i in range(COUNT)]


@pytest.fixture(scope="module")
def ours() -> nn.Module:
    model = base(NATIVE)
    for name in NAMES:
        fastlora.patch(model, r=RANK, targets=TARGETS, adapter=name)
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    config = peft.LoraConfig(r=RANK, target_modules=TARGETS)
    model = peft.get_peft_model(base(NATIVE), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    return model.eval()


def test_mixed_batch(compare, ours, theirs):
    ids, rows = make_ids(ROWS, TOKENS), NAMES[:ROWS]

    def one():
        with torch.no_grad():
            return ours(input_ids=ids, use_cache=False).logits

    def mixed():
        with torch.no_grad(), fastlora.mixed(ours, rows):
            return ours(input_ids=ids, use_cache=False).logits

    def mixed_of_peft():
        with torch.no_grad():
            return theirs(input_ids=ids, use_cache=False, adapter_names=rows).logits

    contenders = {"one adapter": one, "fastlora, 8 adapters": mixed, "PEFT, 8 adapters": mixed_of_peft}
    compare("mixed batch", f"{ROWS} x {TOKENS} tokens, {COUNT} adapters, r={RANK}", contenders, ["one adapter"])


def test_switching(compare, ours, theirs):
    turn = iter(range(1 << 30))

    def switch():
        fastlora.set_adapter(ours, NAMES[next(turn) % COUNT])

    def switch_in_peft():
        theirs.set_adapter(NAMES[next(turn) % COUNT])

    contenders = {"fastlora": switch, "PEFT": switch_in_peft}
    compare("switching", f"{COUNT} adapters on {4 * len(TARGETS)} layers", contenders, ["PEFT"])


def test_adding(compare):
    config = peft.LoraConfig(r=RANK, target_modules=TARGETS)
    model, wrapped = base(NATIVE), peft.get_peft_model(base(NATIVE), config, "first")
    fastlora.patch(model, r=RANK, targets=TARGETS, adapter="first")

    def add():
        fastlora.patch(model, r=RANK, targets=TARGETS, adapter="next")
        fastlora.delete_adapter(model, "next")

    def add_in_peft():
        wrapped.add_adapter("next", config)
        wrapped.delete_adapter("next")

    contenders = {"fastlora": add, "PEFT": add_in_peft}
    compare("adding", f"one more adapter on {4 * len(TARGETS)} layers, and off again", contenders, ["PEFT"])
