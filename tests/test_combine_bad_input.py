"""Combinations that make no sense: one error that names what is wrong, and nothing changed."""

import pytest
from models import make_model
from test_bad_input import refused
from test_combine import NAMES, WEIGHTS, ours

import fastlora
from fastlora.adapters.registry import adapters

REFUSED = {
    "unknown adapter": (dict(adapters=["one", "four"]), "adapters: expected some of .*found 'four'"),
    "no adapters": (dict(adapters=[], weights=[]), r"adapters: expected a list .*found \[\]"),
    "a string": (dict(adapters="one"), "adapters: expected a list .*found 'one'"),
    "name exists": (dict(name="two"), "expected a new name, found 'two'"),
    "name with dots": (dict(name="a.b"), "name without dots"),
    "too few weights": (dict(weights=[1.0]), "weights: expected one for each of 2 adapters, found 1"),
    "nan weight": (dict(weights=[1.0, float("nan")]), "weights: expected finite numbers"),
    "method": (dict(method="mean"), "method: expected one of .*found 'mean'"),
    "majority sign": (dict(method="ties", density=0.5, majority_sign="all"), "majority_sign: expected .*found 'all'"),
    "no density": (dict(method="ties"), "density: expected 0 < density <= 1 for 'ties', found None"),
    "density 0": (dict(method="dare_linear", density=0.0), "found 0.0"),
    "density above 1": (dict(method="ties_svd", density=1.5), "found 1.5"),
    "density without pruning": (dict(method="cat", density=0.5), "density: expected None for 'cat'"),
    "rank without svd": (dict(method="linear", rank=4), "rank: expected None for 'linear'"),
    "rank 0": (dict(rank=0), "rank: expected a whole number of at least 1, found 0"),
    "rank not whole": (dict(rank=2.0), "rank: .*found 2.0"),
    "ranks differ": (
        dict(adapters=["one", "wide"], method="linear"),
        "expected equal ranks for 'linear', found 4 of 'one' and 6 of 'wide' in 'model.layers.0.self_attn.q_proj'",
    ),
    "nan in an adapter": (
        dict(adapters=["one", "broken"]),
        "adapter 'broken' in 'model.layers.1.self_attn.q_proj': expected finite",
    ),
    "overflow": (dict(weights=[3e38, 3e38], method="cat"), "the combined adapter in .*: expected finite"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(arguments, message):
    model = ours("llama")
    fastlora.patch(model, r=6, targets=["q_proj"], adapter="wide")
    fastlora.patch(model, r=4, targets=["q_proj"], adapter="broken")
    model.model.layers[1].self_attn.q_proj.lora_B["broken"].data[2, 1] = float("nan")
    values = dict(adapters=["one", "two"], weights=[1.0, 1.0], name="new") | arguments
    registered = dict(adapters(model))
    refused(model, message, lambda: fastlora.combine(model, **values))
    assert adapters(model) == registered


def test_refuses_a_merged_and_an_unpatched_model():
    model = ours("llama")
    fastlora.merge(model)
    refused(model, "expected an unmerged model", lambda: fastlora.combine(model, NAMES, WEIGHTS, "new"))
    model = make_model("llama")
    refused(model, "expected one that was patched", lambda: fastlora.combine(model, NAMES, WEIGHTS, "new"))


@pytest.mark.parametrize(
    "settings",
    [dict(use_dora=True), dict(lora_bias=True), dict(trainable_token_indices=[3]), dict(modules_to_save=["lm_head"])],
    ids=str,
)
def test_more_than_a_and_b(settings):
    model = make_model("llama")
    config = fastlora.LoraConfig(r=2, target_modules=["q_proj"], **settings)
    fastlora.patch(model, config=config, adapter="one")
    with pytest.raises(ValueError, match="expected A and B alone, found 'one'"):
        fastlora.combine(model, ["one"], [1.0], "new")
    assert list(adapters(model)) == ["one"]
