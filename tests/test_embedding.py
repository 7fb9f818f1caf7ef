"""LoRA on embeddings, beside PEFT where PEFT is right."""

import copy

import pytest
import torch
import transformers
from accuracy import assert_as_accurate_as_eager
from models import make_batch, make_model
from pairs import adapter_of, assert_same_tensors, bits, fill
from side_by_side import (
    assert_files_travel,
    assert_merges,
    assert_same_draws,
    assert_trains_as_peft,
    llama,
    output,
    patched,
    seeded,
    settings,
    step,
    wrapped,
)
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import fastlora
from fastlora.adapters.registry import lora_layers
from fastlora.layers import LinearLayer, LoraEmbedding
from fastlora_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:(Model has .tie_word_embeddings|Setting .save_embedding|.*fan_in)")


@seeded
def gemma():
    """Its embedding has `embed_scale` as a tensor, and a padding index."""
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(head_dim=12, num_key_value_heads=2, **sizes))


@seeded
def bart():
    """Its embeddings have `embed_scale` as a number."""
    return nn.Sequential(BartScaledWordEmbedding(96, 48, padding_idx=1, embed_scale=48**0.5), nn.Linear(48, 24))


def gpt2():
    return make_model("gpt2")


BATCH = {"input_ids": make_batch(tokens=16, batch=4)["input_ids"]}
CASES = {
    "untied": (llama(False), settings("embed_tokens", "q_proj")),
    "tied": (llama(True), settings("embed_tokens", "q_proj")),
    "rslora": (llama(False), settings("embed_tokens", use_rslora=True, rank_pattern={"embed_tokens": 3})),
    "gpt2": (gpt2, settings("wte", "wpe", "c_attn")),
    "scaled-by-tensor": (gemma, settings("embed_tokens")),
    "scaled-by-number": (bart, settings("0", "1")),
    "dora": (llama(True), settings("embed_tokens", "q_proj", use_dora=True)),
    "dora-scaled": (gemma, settings("embed_tokens", use_dora=True)),
}
BATCHES = {bart: {"x": BATCH["input_ids"]}}
each_case = pytest.mark.parametrize(("make", "config"), CASES.values(), ids=CASES.keys())


@each_case
def test_trains_as_peft(make, config):
    assert_trains_as_peft(make, config, BATCHES.get(make, BATCH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("case", ["untied", "gpt2", "scaled-by-tensor"])
def test_one_seed_draws_the_adapter_of_peft(case, init, dtype):
    make, config = CASES[case]
    assert_same_draws(make, config | dict(init_lora_weights=init), dtype)


EXTRA = {"untied", "tied", "rslora", "scaled-by-tensor", "dora", "dora-scaled"}  # where a target is `embed_tokens`


@each_case
def test_files_travel(make, config, tmp_path, request):
    case = request.node.callspec.id
    extra = {"base_model.model.model.embed_tokens.base_layer.weight"} if case in EXTRA else set()
    assert_files_travel(make, config, BATCHES.get(make, BATCH), tmp_path, extra)


@each_case
def test_merges_and_undoes(make, config):
    assert_merges(make, config, BATCHES.get(make, BATCH))


def rows(layer, dtype):
    """All rows of an adapted embedding by the formula, computed in one dtype."""
    w, a, b, scale = (t.detach().to(dtype) for t in (layer.weight, *layer._matrices("default"), scale_of(layer)))
    moved = w + layer.scaling["default"] * (a.T @ b.T)
    if not layer.has_magnitude("default"):
        return moved * scale
    return layer.lora_magnitude["default"].detach().to(dtype) / moved.norm(dim=0) * moved * scale


def scale_of(layer):
    return torch.as_tensor(getattr(layer, "embed_scale", 1.0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_are_as_accurate_as_eager(case, dtype):
    make, config = CASES[case]
    model = fill(patched(make, config, dtype), 3).eval()
    assert {p.dtype for p in adapter_of(model).values()} == {torch.float32}
    layers = [layer for layer in lora_layers(model).values() if isinstance(layer, LoraEmbedding)]
    assert layers
    for layer in layers:
        y = layer(torch.arange(layer.num_embeddings))
        assert_as_accurate_as_eager(y, rows(layer, dtype), rows(layer, torch.float64), case)
    before = bits(model)
    fastlora.merge(model)
    assert all(layer.weight.is_contiguous() for layer in layers)
    fastlora.unmerge(model)
    assert_same_tensors(bits(model), before)


# Dropout, which PEFT does not apply


def with_dropout(module, dora=False):
    model = nn.Sequential(module)
    config = fastlora.LoraConfig(r=5, lora_alpha=10, target_modules=["0"], lora_dropout=0.4, use_dora=dora)
    return fill(fastlora.patch(model, config=config), 3)[0]


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_drops_elements_of_the_branch(dora):
    layer, ids = with_dropout(nn.Embedding(20, 8), dora).train(), torch.randint(20, (3, 7))
    torch.manual_seed(9)
    y = layer(ids)
    torch.manual_seed(9)
    mask = reference.dropout_mask(torch.randint(2**63 - 1, (1,)), 21, 5, 0.4)
    assert 0 < mask.sum() < mask.numel()
    a, b, frozen = layer.lora_A["default"], layer.lora_B["default"], layer._parameters["weight"][ids]
    hidden = a.T[ids] * mask.view(3, 7, 5) / 0.6
    factor = layer.lora_magnitude["default"] / (layer.weight.T + 2 * b @ a).norm(dim=1) if dora else 1
    torch.testing.assert_close(y, factor * (frozen + 2 * hidden @ b.T))
    assert torch.equal(layer.eval()(ids), layer(ids))


def test_dropout_is_that_of_the_seed_under_checkpointing():
    model = patched(llama(False), settings("embed_tokens", "q_proj", lora_dropout=0.3)).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(7)
        results.append(step(fill(model, 3), BATCH))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# Several adapters, and how a model with them moves


def test_active_adapters_add_up():
    make, config = CASES["untied"]
    model = fill(patched(make, config), 3)
    layer, ids = model.model.embed_tokens, BATCH["input_ids"]
    frozen = layer._parameters["weight"][ids]
    fastlora.patch(model, r=2, targets=["embed_tokens"], adapter="second")
    second = layer(ids) - frozen
    assert not second.any()
    fill(model, 4, "second")
    second = layer(ids) - frozen
    fastlora.set_adapter(model, "default")
    first = layer(ids) - frozen
    fastlora.set_adapter(model, ["default", "second"])
    both = layer(ids)
    torch.testing.assert_close(both, frozen + first + second)
    fastlora.merge(model)
    torch.testing.assert_close(layer(ids), both)
    layer.unmerge()
    layer.delete_adapter("default")
    torch.testing.assert_close(layer(ids), frozen + second)


@pytest.mark.parametrize("dora", [False, True])
def test_compiles_without_a_graph_break(dora):
    torch.compiler.reset()
    make, config = CASES["scaled-by-tensor"]
    model = fill(patched(make, config | dict(use_dora=dora, lora_dropout=0.2)), 3).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        y = output(call, BATCH)
        y.square().mean().backward()
        results.append({"output": y.detach()} | {n: p.grad.clone() for n, p in adapter_of(model).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_copies_and_state():
    make, config = CASES["dora-scaled"]
    model = fill(patched(make, config), 3).eval()
    twin = copy.deepcopy(model)
    fresh = patched(make, config).eval()
    fresh.load_state_dict(model.state_dict())
    expected = output(model, BATCH)
    fastlora.unload(model)
    assert torch.equal(output(twin, BATCH), expected)
    assert torch.equal(output(fresh, BATCH), expected)


def test_int8_leaves_embeddings_dense():
    config = fastlora.LoraConfig(**settings("embed_tokens", "q_proj"))
    model = fastlora.patch(llama(True)(), config=config, quantize="int8")
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.model.embed_tokens._parameters["weight"] is model.lm_head.weight
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8


def test_all_linear_selects_no_embedding():
    model = fastlora.patch(llama(False)(), targets="all-linear")
    assert all(isinstance(layer, LinearLayer) for layer in lora_layers(model).values())


# Kinds of embeddings


def test_padding_has_no_gradient():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 8, padding_idx=3))

    batch = {"x": torch.tensor([[3, 3, 5], [1, 3, 5]])}
    ours, theirs = (fill(build(make, settings("0")), 3) for build in (patched, wrapped))
    expected = step(theirs, batch)
    found = step(ours, batch)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    (gradient,) = (p.grad for n, p in adapter_of(ours).items() if n.endswith("_A"))
    assert gradient[:, 5].any()
    assert not gradient[:, 3].any()


def test_frequency_scales_the_gradient_as_in_peft():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 8, scale_grad_by_freq=True))

    assert_trains_as_peft(make, settings("0"), {"x": torch.randint(20, (4, 9))})


def test_a_sparse_embedding_gets_dense_gradients():
    """Only those suit AdamW, and the weight that `sparse` is about is frozen."""
    torch.manual_seed(0)
    sparse, dense = nn.Sequential(nn.Embedding(20, 8, sparse=True)), nn.Sequential(nn.Embedding(20, 8))
    dense.load_state_dict(sparse.state_dict())
    batch = {"x": torch.randint(20, (4, 9))}
    results = [step(fill(patched(lambda m=m: m, settings("0")), 3), batch) for m in (sparse, dense)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(p.grad.layout == torch.strided for p in adapter_of(sparse).values())


class Shifted(nn.Embedding):
    """Like the positions of OPT."""

    def forward(self, positions):
        return super().forward(positions + 2)


REFUSED = {
    "max_norm": (nn.Embedding(9, 4, max_norm=1.0), {}, ValueError, "without max_norm, .* found max_norm=1.0 at '0'"),
    "lora_bias": (nn.Embedding(9, 4), dict(lora_bias=True), ValueError, "no embeddings among the targets.*'0'"),
    "own-forward": (Shifted(9, 4), {}, TypeError, "expected nn.Linear, .* found Shifted at '0'"),
}


@pytest.mark.parametrize(("module", "more", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(module, more, error, message):
    model = nn.Sequential(module)
    with pytest.raises(error, match=message):
        fastlora.patch(model, config=fastlora.LoraConfig(**settings("0", **more)))
    assert type(model[0]) is type(module)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_scale_per_feature_is_refused():
    embedding = gemma().model.embed_tokens
    embedding.embed_scale = torch.ones(48)
    with pytest.raises(ValueError, match=r"one number as embed_scale, found shape \(48,\)"):
        fastlora.patch(nn.Sequential(embedding), config=fastlora.LoraConfig(**settings("0")))
