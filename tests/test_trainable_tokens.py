"""Trainable tokens, beside PEFT and together with LoRA on other layers."""

import pytest
import torch
import transformers
from accuracy import assert_as_accurate_as_eager
from compilers import compiles
from models import make_batch, make_model
from pairs import adapter_of, bits, fill
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
    wrapped,
)
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

import fastlora

pytestmark = pytest.mark.filterwarnings("ignore:(Model has .tie_word|Model with .tie_word|.*fan_in)")

TOKENS = [7, 3, 90]
IDS = torch.cat([make_batch(tokens=13, batch=4)["input_ids"], torch.tensor([TOKENS] * 4)], dim=1)
BATCH, PLAIN = {"input_ids": IDS}, {"x": IDS}


@seeded
def gemma():
    """Its embedding has `embed_scale` and a padding index, and its weight is the head's."""
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=4, vocab_size=96)
    config = transformers.Gemma3TextConfig(
        head_dim=12, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=3, **sizes
    )
    return transformers.Gemma3ForCausalLM(config)


@seeded
def bart():
    return nn.Sequential(BartScaledWordEmbedding(96, 48, padding_idx=1, embed_scale=48**0.5), nn.Linear(48, 24))


def t5():
    return make_model("t5")


def tokens(indices, *targets):
    return settings(*(targets or ("q_proj",)), trainable_token_indices=indices)


CASES = {
    "untied": (llama(False), tokens(TOKENS), BATCH),
    "tied": (llama(True), tokens(TOKENS), BATCH),
    "one": (llama(True), tokens([90]), BATCH),
    "dict": (llama(False), tokens({"embed_tokens": TOKENS}), BATCH),
    "both-untied": (llama(False), tokens({"embed_tokens": TOKENS, "lm_head": [5, 1]}), BATCH),
    "both-tied": (llama(True), tokens({"lm_head": TOKENS, "model.embed_tokens": TOKENS}), BATCH),
    "head-alone": (llama(False), tokens({"lm_head": TOKENS}), BATCH),
    "gpt2": (lambda: make_model("gpt2"), tokens(TOKENS, "c_attn"), BATCH),
    "positions": (lambda: make_model("gpt2"), tokens({"wpe": [2, 0]}, "c_attn"), BATCH),
    "scaled-by-tensor": (gemma, tokens(TOKENS), BATCH),
    "scaled-by-number": (bart, tokens({"0": TOKENS}, "1"), PLAIN),
    "four-modules": (t5, tokens(TOKENS, "q", "wo"), BATCH | {"decoder_input_ids": IDS.flip(1)}),
}
each_case = pytest.mark.parametrize(("make", "config", "batch"), CASES.values(), ids=CASES.keys())


@each_case
def test_trains_as_peft(make, config, batch):
    assert_trains_as_peft(make, config, batch)


@each_case
def test_files_travel(make, config, batch, tmp_path):
    assert_files_travel(make, config, batch, tmp_path, set())


@each_case
def test_merges_and_undoes(make, config, batch):
    assert_merges(make, config, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["untied", "tied", "both-untied"])
def test_starts_with_the_rows_of_the_model(case, dtype):
    make, config, batch = CASES[case]
    assert_same_draws(make, config, dtype)
    model = make().to(dtype).eval()
    embedding, ids = model.model.embed_tokens, batch["input_ids"]
    rows, eager, exact = embedding(ids), output(model, batch), output(make().double().eval(), batch)
    fastlora.patch(model, config=fastlora.LoraConfig(**config), allow_output_head=True)
    assert torch.equal(embedding(ids), rows)
    # The head computes some columns in a product of their own, whose last bit may differ.
    assert_as_accurate_as_eager(output(model, batch), eager, exact, "logits")


@pytest.mark.parametrize("case", ["untied", "tied", "both-untied", "gpt2", "four-modules"])
def test_merged_weights_are_those_of_peft(case):
    make, config, _ = CASES[case]
    ours = fastlora.unload(fill(patched(make, config), 3), merge=True)
    theirs = fill(wrapped(make, config), 3).merge_and_unload().state_dict()
    found = {name: t for name, t in bits(ours).items() if t.shape == (96, 48)}
    assert len(found) >= 2
    for name, value in found.items():
        assert torch.equal(value, theirs[name]), name
    assert all(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("case", ["tied", "scaled-by-tensor", "four-modules"])
def test_compiles_without_a_graph_break(case):
    make, config, batch = CASES[case]
    if not compiles(make().train(), lambda call: output(call, batch)):
        pytest.skip("this torch does not compile the plain model")
    model = fill(patched(make, config | dict(lora_dropout=0.2)), 3).train()
    compiled, results = torch.compile(model, fullgraph=True, backend="aot_eager"), []
    for call in (model, compiled):
        torch.manual_seed(1)
        model.zero_grad()
        y = output(call, batch)
        y.square().mean().backward()
        results.append({"output": y.detach()} | {n: p.grad.clone() for n, p in adapter_of(model).items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
