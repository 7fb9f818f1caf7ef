"""Combinations of adapters: PEFT's mathematics under every method, and right where PEFT's are not."""

import itertools
import math

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model

import fastlora
from fastlora.adapters.combine import METHODS
from fastlora.adapters.registry import adapters, lora_layers

pytestmark = pytest.mark.filterwarnings("ignore:(fan_in_fan_out|.*density 1.0 is greater than or equal to 1)")

NAMES = ["one", "two", "three"]
WEIGHTS = [0.75, -0.5, 1.25]
PRUNING = [method for method in METHODS if method not in ("svd", "cat", "linear")]
BOTH_MODELS = pytest.mark.parametrize("model_name", ["llama", "gpt2"])


def settings(model_name, **others):
    """The settings of three adapters: by default of one rank and one alpha."""
    common = dict(r=4, lora_alpha=6, target_modules=MODELS[model_name][1])
    return [common | {key: values[i] for key, values in others.items()} for i in range(len(NAMES))]


def random_pair(a, b, generator):
    for tensor in (a, b):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) / math.sqrt(tensor.shape[1]))


def ours(model_name, dtype=torch.float32, **others):
    model = make_model(model_name, dtype)
    for seed, (name, values) in enumerate(zip(NAMES, settings(model_name, **others), strict=True)):
        fastlora.patch(model, adapter=name, config=fastlora.LoraConfig(**values))
        generator = torch.Generator().manual_seed(seed)
        for layer in lora_layers(model).values():
            if name in layer.lora_A:
                random_pair(layer.lora_A[name], layer.lora_B[name], generator)
    return model


def theirs(model_name, dtype=torch.float32, **others):
    model = make_model(model_name)
    for seed, (name, values) in enumerate(zip(NAMES, settings(model_name, **others), strict=True)):
        config = peft.LoraConfig(**values)
        if seed == 0:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(seed)
        for layer in peft_layers(model).values():
            if name in layer.lora_A:
                random_pair(layer.lora_A[name].weight, layer.lora_B[name].weight, generator)
    return model.to(dtype)


def peft_layers(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model."): layer for name, layer in layers.items()}


def delta(layer, name, dtype=None):
    """`scaling * B A` of a layer of either library, computed in a dtype."""
    a, b = (getattr(pair[name], "weight", pair[name]).detach().to(dtype) for pair in (layer.lora_A, layer.lora_B))
    return layer.scaling[name] * (b @ a)


def deltas(model, name="new"):
    layers = lora_layers(model) or peft_layers(model)
    return {path: delta(layer, name) for path, layer in layers.items() if name in layer.lora_A}


def combined_by_peft(model, method, rank=None, density=None, majority_sign="total"):
    model.add_weighted_adapter(
        NAMES, WEIGHTS, "new", combination_type=method, svd_rank=rank, density=density,
        majority_sign_method=majority_sign,
    )  # fmt: skip
    return deltas(model)


def weighted_sums(model, dtype):
    """The sum of the weighted deltas by layer, computed in a dtype."""
    return {
        path: sum(w * delta(layer, name, dtype) for name, w in zip(NAMES, WEIGHTS, strict=True))
        for path, layer in lora_layers(model).items()
    }


def truncated(matrix, rank):
    """The nearest matrix of a rank."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


class SameDraws:
    """Stands in for torch.bernoulli: random masks that are the same for a matrix and for its transpose."""

    def __init__(self):
        self.calls = 0

    def __call__(self, probabilities, *, generator=None):
        self.calls += 1
        side = max(probabilities.shape)
        draws = torch.rand(side, side, generator=torch.Generator().manual_seed(self.calls))
        draws = draws.triu() + draws.triu(1).T
        return (draws[: probabilities.shape[0], : probabilities.shape[1]] < probabilities).to(probabilities.dtype)


def assert_same_deltas(results, theirs, exact):
    assert results.keys() == theirs.keys() == exact.keys()
    for path in results:
        assert_as_accurate_as_eager(results[path], theirs[path], exact[path], path)


CASES = [
    *((method, {}) for method in ("svd", "cat", "linear")),
    ("svd", dict(rank=3)),
    *((method, dict(density=density)) for method, density in itertools.product(PRUNING, (0.3, 1.0))),
    *((method, dict(density=0.5, majority_sign="frequency")) for method in PRUNING if "ties" in method),
    ("ties_svd", dict(density=0.5, rank=9)),
]


@BOTH_MODELS
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_effective_delta_is_that_of_peft(model_name, method, options, monkeypatch):
    results = []
    for make, dtype in ((ours, torch.float32), (theirs, torch.float32), (theirs, torch.float64)):
        model = make(model_name, dtype)
        monkeypatch.setattr(torch, "bernoulli", SameDraws())
        if make is ours:
            results.append(deltas(fastlora.combine(model, NAMES, WEIGHTS, "new", method, **options)))
        else:
            results.append(combined_by_peft(model, method, **options))
    assert_same_deltas(*results)


@BOTH_MODELS
@pytest.mark.parametrize("method", ["svd", "cat", "ties_svd"])
def test_different_ranks_and_targets_as_peft(model_name, method):
    """PEFT combines adapters on different modules too: where one is missing it counts as zero."""
    targets = {"llama": [["q_proj"], ["q_proj", "down_proj"], ["v_proj"]], "gpt2": [["c_attn"], ["c_fc"], ["c_fc"]]}
    others = dict(r=[4, 2, 7], lora_alpha=[4, 6, 14], target_modules=targets[model_name])
    density = 0.5 if method == "ties_svd" else None
    model, reference, exact = ours(model_name, **others), theirs(model_name, **others), theirs(model_name, **others)
    results = deltas(fastlora.combine(model, NAMES, WEIGHTS, "new", method, density=density))
    exact = combined_by_peft(exact.double(), method, density=density)
    assert_same_deltas(results, combined_by_peft(reference, method, density=density), exact)
    assert adapters(model)["new"].r == reference.peft_config["new"].r
    assert set(adapters(model)["new"].target_modules) == reference.peft_config["new"].target_modules


PATTERNS = dict(
    r=[4, 2, 7], lora_alpha=[4, 6, 14], use_rslora=[True, True, False],
    rank_pattern=[{}, {"v_proj": 9, "down_proj": 3}, {}], alpha_pattern=[{"down_proj": 3}, {}, {}],
)  # fmt: skip


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 5), ("svd", 60)])
@pytest.mark.parametrize("others", [dict(use_rslora=[True] * 3), PATTERNS], ids=["rslora", "patterns"])
def test_sum_is_right_with_rslora_and_patterns(others, method, rank):
    model = ours("llama", **others)
    eager, exact = weighted_sums(model, torch.float32), weighted_sums(model, torch.float64)
    if method == "svd":
        eager, exact = ({path: truncated(d, rank) for path, d in sums.items()} for sums in (eager, exact))
    assert_same_deltas(deltas(fastlora.combine(model, NAMES, WEIGHTS, "new", method, rank=rank)), eager, exact)


def test_peft_scales_rslora_by_the_root_of_the_rank():
    """The fault that ours does not have: the reason for not comparing with PEFT above."""
    others = dict(use_rslora=[True] * 3)
    model = ours("llama", **others)
    eager, exact = weighted_sums(model, torch.float32), weighted_sums(model, torch.float64)
    from_peft = combined_by_peft(theirs("llama", **others), "cat")
    rank = 4 * len(NAMES)
    assert_same_deltas({path: d / math.sqrt(rank) for path, d in from_peft.items()}, eager, exact)
    assert_same_deltas(deltas(fastlora.combine(model, NAMES, WEIGHTS, "new", "cat")), eager, exact)
    assert adapters(model)["new"].r == rank


@pytest.mark.parametrize("use_rslora", [False, True])
def test_linear_on_one_adapter_scales_its_delta(use_rslora):
    for weight in (0.3, -1.7):
        model = ours("llama", use_rslora=[use_rslora] * 3)
        fastlora.combine(model, ["two"], [weight], "new", "linear")
        for path, layer in lora_layers(model).items():
            scaled = [weight * delta(layer, "two", dtype) for dtype in (torch.float32, torch.float64)]
            assert_as_accurate_as_eager(delta(layer, "new"), *scaled, path)


def test_one_adapter_is_combined_by_the_method_that_was_asked_for():
    model = ours("llama")
    fastlora.combine(model, ["one"], [1.0], "cut", "svd", rank=2)
    fastlora.combine(model, ["one"], [1.0], "pruned", "magnitude_prune", density=0.5)
    for path, layer in lora_layers(model).items():
        whole = [truncated(delta(layer, "one", dtype), 2) for dtype in (torch.float32, torch.float64)]
        assert_as_accurate_as_eager(delta(layer, "cut"), *whole, path)
        assert (layer.lora_A["pruned"] == 0).sum() == layer.lora_A["one"].numel() // 2


def test_dare_draws_from_the_generator():
    model = ours("llama")
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        generator = torch.Generator().manual_seed(seed)
        fastlora.combine(model, NAMES, WEIGHTS, name, "dare_linear", density=0.5, generator=generator)
    for layer in lora_layers(model).values():
        first, again, other = (layer.lora_A[name] for name in ("first", "again", "other"))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@torch.no_grad()
def logits(model):
    return model.eval()(**make_batch()).logits


@BOTH_MODELS
@pytest.mark.parametrize("trainable", [False, True])
def test_new_adapter_is_registered_and_not_active(model_name, trainable):
    model = ours(model_name)
    before, active = logits(model), "three"
    fastlora.combine(model, NAMES, WEIGHTS, "new", trainable=trainable)
    assert all(layer.active_adapters == (active,) for layer in lora_layers(model).values())
    assert torch.equal(logits(model), before)
    assert {p.requires_grad for n, p in model.named_parameters() if n.endswith(".new")} == {trainable}
    assert adapters(model)["new"].scaling(4, adapters(model)["new"].lora_alpha) == 1
    fastlora.set_adapter(model, "new")
    assert not torch.equal(logits(model), before)
    reference = theirs(model_name)
    combined_by_peft(reference, "svd")
    assert reference.active_adapters == [NAMES[0]]  # PEFT's first stays active, too
    assert not any(p.requires_grad for n, p in reference.named_parameters() if ".new." in n)


@BOTH_MODELS
@pytest.mark.parametrize("others", [{}, dict(r=[4, 2, 7], use_rslora=[True] * 3)], ids=["plain", "rslora"])
def test_peft_loads_what_was_combined(model_name, others, tmp_path):
    others |= dict(exclude_modules=[["h.0.mlp.c_fc", "0.mlp.down_proj"], None, None], layers_to_transform=[0, 1, 1])
    model = ours(model_name, **others)
    fastlora.set_adapter(fastlora.combine(model, NAMES, WEIGHTS, "new", "cat"), "new")
    fastlora.save(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(model_name), tmp_path / "new")
    exact = logits(peft.PeftModel.from_pretrained(make_model(model_name), tmp_path / "new").double())
    assert {n for n, layer in peft_layers(loaded).items()} == {
        n for n, m in lora_layers(model).items() if "new" in m.lora_A
    }
    assert_as_accurate_as_eager(logits(model), logits(loaded), exact, "logits")


def test_combines_on_an_int8_model_in_bfloat16():
    model = make_model("llama", torch.bfloat16)
    for seed, name in enumerate(NAMES):
        fastlora.patch(model, r=4, targets=["q_proj"], adapter=name, quantize="int8")
        for layer in lora_layers(model).values():
            random_pair(layer.lora_A[name], layer.lora_B[name], torch.Generator().manual_seed(seed))
    eager, exact = weighted_sums(model, torch.float32), weighted_sums(model, torch.float64)
    assert_same_deltas(deltas(fastlora.combine(model, NAMES, WEIGHTS, "new", "cat")), eager, exact)
