"""Layers with trainable tokens: ties, several adapters, how a model with them moves, and what is refused."""

import copy

import pytest
import torch
from models import make_batch
from pairs import PREFIX, adapter_of, assert_same_tensors, bits, fill
from safetensors.torch import load_file, save_file
from side_by_side import (
    assert_merges,
    assert_same_output,
    assert_undone,
    llama,
    output,
    patched,
    seeded,
    settings,
    step,
    wrapped,
)
from torch import nn

import fastlora
from fastlora.adapters.registry import lora_layers
from fastlora.layers.tokens import TokenEmbedding, TokenHead

pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word")

TOKENS = [7, 3, 90]
IDS = torch.cat([make_batch(tokens=13, batch=4)["input_ids"], torch.tensor([TOKENS] * 4)], dim=1)
BATCH = {"input_ids": IDS}


def tokens(indices, *targets):
    return settings(*(targets or ("q_proj",)), trainable_token_indices=indices)


def tied():
    return fill(patched(llama(True), tokens(TOKENS)), 3).eval()


@seeded
def head_with_bias():
    """A head that has the embedding's weight and a bias, which PEFT forgets."""
    model = nn.Sequential(nn.Embedding(96, 48), nn.Linear(48, 48), nn.Linear(48, 96))
    model[2].weight = model[0].weight
    return model


# Layers with one weight


def test_a_head_follows_the_embedding_of_its_weight():
    model = tied()
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, TokenEmbedding)
    assert isinstance(head, TokenHead)
    assert [name for name in adapter_of(model) if "token" in name] == [
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"
    ]
    assert sum("token_rows" in name for name, _ in model.named_parameters(remove_duplicate=False)) == 1
    assert not [name for name in model.state_dict() if "lm_head.token" in name]
    rows, x = embedding.token_rows["default"], torch.randn(5, 48)
    torch.testing.assert_close(head(x)[:, TOKENS], x @ rows.T)
    assert torch.equal(embedding(torch.tensor(TOKENS)), rows)
    fastlora.merge(model)
    assert embedding._parameters["weight"] is head._parameters["weight"]
    assert model.config.tie_word_embeddings
    assert torch.equal(head.weight[TOKENS], rows)
    fastlora.unload(model)
    assert model.model.embed_tokens.weight is model.lm_head.weight


def test_a_weight_that_is_read_has_the_trained_rows():
    """Losses that read the head's weight instead of calling it train the rows as well, as with PEFT's wrapper."""
    model = tied()
    frozen, rows = model.lm_head._parameters["weight"], model.model.embed_tokens.token_rows["default"]
    for layer in (model.lm_head, model.model.embed_tokens):
        assert torch.equal(layer.weight[TOKENS], rows)
        (gradient,) = torch.autograd.grad(layer.weight.sum(), rows)
        assert torch.equal(gradient, torch.ones_like(rows))
        with fastlora.disabled(model):
            assert layer.weight is frozen
    others = [row for row in range(96) if row not in TOKENS]
    assert torch.equal(model.lm_head.weight[others], frozen[others])


def test_a_bias_of_the_head_stays():
    config = tokens({"0": TOKENS}, "1")
    model = fill(patched(head_with_bias, config), 3).eval()
    frozen, x = model[2], torch.randn(5, 48)
    expected = x @ frozen.weight.T + frozen.bias
    torch.testing.assert_close(frozen(x), expected)
    assert_merges(head_with_bias, config, {"x": IDS})


def test_files_with_embeddings_and_rows_of_followers_load(tmp_path):
    """PEFT writes both when it is told to save embedding layers."""
    theirs = fill(wrapped(llama(True), tokens(TOKENS)), 3)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta" in file
    assert f"{PREFIX}lm_head.token_adapter.base_layer.weight" in file
    assert_same_output(fastlora.load(llama(True)(), tmp_path), theirs, BATCH)


# Several adapters, and how a model with them moves


def with_two(second):
    model = tied()
    config = fastlora.LoraConfig(**tokens(second, "v_proj"))
    return fill(fastlora.patch(model, config=config, adapter="second"), 4, "second")


def test_active_adapters_replace_their_own_rows():
    model = with_two([1, 95])
    layer, frozen = model.model.embed_tokens, llama(True)().model.embed_tokens.weight
    first, second = layer.token_rows["default"], layer.token_rows["second"]
    assert torch.equal(layer.weight[[*TOKENS, 1, 95]], torch.cat([frozen[TOKENS], second]))
    fastlora.set_adapter(model, ["default", "second"])
    expected = torch.cat([first, second])
    assert torch.equal(layer.weight[[*TOKENS, 1, 95]], expected)
    assert torch.equal(layer(torch.tensor([*TOKENS, 1, 95])), expected)
    before = output(model, BATCH)
    torch.testing.assert_close(output(fastlora.merge(model), BATCH), before)
    fastlora.unmerge(model)
    assert torch.equal(output(model, BATCH), before)
    for part in (layer, model.lm_head):
        part.rename_adapter("second", "third")
        part.delete_adapter("default")
        assert part.active_adapters == ("third",)
    assert torch.equal(model.lm_head.weight[[1, 95]], second)
    assert torch.equal(model.lm_head.weight[TOKENS], frozen[TOKENS])


def test_one_row_cannot_be_replaced_twice():
    model = with_two([1, 90])
    with pytest.raises(ValueError, match=r"found token 90 in 'default' and 'second'"):
        fastlora.set_adapter(model, ["default", "second"])
    assert {layer.active_adapters for layer in lora_layers(model).values()} == {("second",), ()}


def test_copies_and_state(tmp_path):
    model = with_two([1, 95])
    expected = output(model, BATCH)
    twin, fresh = copy.deepcopy(model), with_two([1, 95])
    fill(fresh, 5, "second")
    fresh.load_state_dict(model.state_dict())
    torch.save(model, tmp_path / "model")
    again = torch.load(tmp_path / "model", weights_only=False)
    fastlora.unload(model)
    for other in (twin, fresh, again):
        assert torch.equal(output(other, BATCH), expected)
        assert other.lm_head.token_rows is other.model.embed_tokens.token_rows
    assert_undone(fastlora.unload(twin), llama(True)())
    assert "second" in again.lm_head.token_rows


def test_moves_to_another_dtype():
    model = tied()
    rows = model.model.embed_tokens.token_rows["default"]
    model.to(torch.bfloat16)
    assert model.model.embed_tokens.token_ids["default"].dtype == torch.int64
    assert torch.equal(model.lm_head.weight[TOKENS], rows)
    assert output(model, BATCH).dtype == torch.bfloat16


def test_autocast_and_checkpointing():
    model = tied().train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model, BATCH))
    assert results[0]["output"].dtype == torch.bfloat16
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_padding_token_has_no_gradient_in_the_embedding():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Linear(8, 8))

    batch = {"x": torch.tensor([[3, 3, 5], [1, 3, 5]])}
    ours, theirs = (fill(build(make, tokens({"0": [3, 5]}, "1")), 3) for build in (patched, wrapped))
    found, expected = step(ours, batch), step(theirs, batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    gradient = found[f"{PREFIX}0.token_adapter.trainable_tokens_delta"]
    assert not gradient[0].any()
    assert gradient[1].any()


# Refusals


def embeddings(**options):
    return lambda: nn.Sequential(nn.Embedding(20, 8, **options), nn.Linear(8, 8))


REFUSED = {
    "outside": (llama(True), tokens([3, 96]), "expected tokens from 0 to 95 for 'model.embed_tokens', found 96"),
    "negative": (llama(True), tokens([-1]), "found -1"),
    "no such layer": (llama(True), tokens({"wte": [1]}), "found 'wte', which no module ends in"),
    "not a table": (llama(True), tokens({"norm": [1]}), "nn.Embedding or nn.Linear without LoRA, found LlamaRMSNorm"),
    "also a target": (llama(True), tokens([1], "embed_tokens"), "found LoRA matrices at 'model.embed_tokens'"),
    "head also a target": (llama(True), tokens([1], "lm_head"), "found LoRA matrices at 'lm_head'"),
    "head of a tie": (llama(True), tokens({"lm_head": [1]}), "'model.embed_tokens', found 'lm_head', which shares"),
    "two lists for a tie": (
        llama(True), tokens({"embed_tokens": [1], "lm_head": [2]}),
        r"same tokens for 'model.embed_tokens' and 'lm_head', which share a weight, found \[1\] and \[2\]",
    ),
    "second of a tie": (head_with_bias, tokens({"2": [1]}, "1"), "expected '0', found '2', which shares its weight"),
    "no embedding": (embeddings(), tokens([1], "1"), "a dict by module name for a model without input embeddings"),
    "max_norm": (embeddings(max_norm=1.0), tokens({"0": [1]}, "1"), "without max_norm, .* found max_norm=1.0 at '0'"),
    "by frequency": (embeddings(scale_grad_by_freq=True), tokens({"0": [1]}, "1"), "without scale_grad_by_freq"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(make, config, message):
    model = make()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        fastlora.patch(model, config=fastlora.LoraConfig(**config), allow_output_head=True)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same_tensors(bits(model), before)


@pytest.mark.parametrize(
    "indices", [[], [1, 1], [1.0], [True], "1", {"embed_tokens": []}, {"embed_tokens": 3}], ids=str
)
def test_config_refuses(indices):
    with pytest.raises(ValueError, match="trainable_token_indices: expected lists of different whole numbers"):
        fastlora.LoraConfig(trainable_token_indices=indices)


def test_lora_of_one_adapter_and_tokens_of_another_do_not_meet():
    model = fastlora.patch(llama(False)(), targets=["embed_tokens"], adapter="first")
    with pytest.raises(ValueError, match=r"without LoRA, found LoraEmbedding at 'model.embed_tokens'"):
        fastlora.patch(model, config=fastlora.LoraConfig(**tokens([1])))
    model = fastlora.patch(llama(True)(), config=fastlora.LoraConfig(**tokens([1])), adapter="first")
    for target in ("embed_tokens", "lm_head"):
        with pytest.raises(TypeError, match=r"found Token(Embedding|Head) at"):
            fastlora.patch(model, targets=[target], allow_output_head=True)


def saved(folder):
    fastlora.save(fill(patched(llama(True), tokens(TOKENS)), 3), folder)
    return folder / "adapter_model.safetensors"


def without_rows(file):
    return {name: t for name, t in file.items() if "token" not in name}


def renamed(file):
    return {name.replace("model.embed_tokens", "model.norm"): t for name, t in file.items()}


DAMAGES = {
    "missing": (without_rows, r"trainable_tokens_delta of shape \[3, 48\] for 'model.embed_tokens', found none"),
    "elsewhere": (renamed, r"shape \[3, 48\] for 'model.embed_tokens', found none"),
    "too many": (lambda f: {n: t.repeat(2, 1) for n, t in f.items()}, r"of shape \[3, 48\] .*, found \[6, 48\]"),
    "not finite": (lambda f: {n: t / 0 for n, t in f.items()}, "found inf or nan in token_adapter"),
    "unasked": (
        lambda f: f | {f"{PREFIX}model.norm.token_adapter.trainable_tokens_delta": torch.ones(3, 48)},
        "expected no trainable tokens for 'model.norm'",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_load_refuses(damage, message, tmp_path):
    file = saved(tmp_path)
    save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    model = llama(True)()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        fastlora.load(model, tmp_path)
    assert not lora_layers(model)
    assert_same_tensors(bits(model), before)
