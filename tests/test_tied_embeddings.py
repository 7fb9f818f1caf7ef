"""Embeddings that share a weight with the output head, and files that bring the base model's embeddings along."""

import peft
import pytest
import torch
import transformers
from models import make_batch, make_model
from pairs import fill
from safetensors.torch import load_file, save_file
from side_by_side import assert_same_output, llama, output, patched, settings, wrapped

import fastlora
from fastlora.adapters.registry import lora_layers

pytestmark = pytest.mark.filterwarnings("ignore:(Model with .tie_word|Model has .tie_word|Setting .save_embedding)")

BATCH = {"input_ids": make_batch(tokens=16, batch=4)["input_ids"]}


def tied_model():
    return fill(patched(llama(True), settings("embed_tokens", "q_proj")), 3).eval()


def test_merging_a_tied_embedding_leaves_the_head_as_it_was(tmp_path):
    """PEFT folds the adapter into the head as well."""
    model = tied_model()
    head, before = model.lm_head.weight, output(model, BATCH)
    fastlora.merge(model)
    assert model.lm_head.weight is head
    assert model.config.tie_word_embeddings is False
    merged = output(model, BATCH)
    fastlora.unmerge(model)
    assert model.config.tie_word_embeddings is True
    assert model.model.embed_tokens.weight is head
    assert torch.equal(output(model, BATCH), before)
    theirs = fill(wrapped(llama(True), settings("embed_tokens", "q_proj")), 3).eval()
    assert_same_output(model, theirs, BATCH)
    wrong = output(theirs.merge_and_unload(), BATCH)
    assert (wrong - before).abs().max() > 100 * (merged - before).abs().max()
    fastlora.unload(model, merge=True).save_pretrained(tmp_path)
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(output(again.eval(), BATCH), merged)


def test_a_weight_of_many_modules_is_not_merged():
    """No file could hold it: what has the old value would be tied to the new one, or be missing."""
    model = fill(fastlora.patch(make_model("t5"), r=4, targets=["shared", "q"]), 3)
    message = (
        r"at most two modules with one weight, found 'shared', .* \['encoder.embed_tokens', 'decoder.embed_tokens'"
    )
    for call in (fastlora.merge, lambda m: fastlora.unload(m, merge=True)):
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            call(model)
        assert [type(module) for module in model.modules()] == before
        assert not any(layer.merged_adapters for layer in lora_layers(model).values())
    fastlora.unload(model)


# Files that bring the base model's embeddings


def saved_by_peft(folder, change=0.0, vocabulary=96):
    """An adapter whose file has the embeddings, the last two rows of which were changed."""

    def make():
        model = llama(True)()
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
        model.model.embed_tokens.weight.data[-2:] += change
        return model

    model = fill(wrapped(make, settings("embed_tokens")), 3)
    model.save_pretrained(folder)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    return model


def test_embeddings_of_a_file_replace_other_ones(tmp_path, caplog):
    theirs = saved_by_peft(tmp_path, change=1.0)
    original = llama(True)().model.embed_tokens.weight.detach()
    model = fastlora.load(llama(True)(), tmp_path)
    assert "replaced 2 rows of model.embed_tokens.weight" in caplog.text
    assert model.lm_head.weight is model.model.embed_tokens._parameters["weight"]
    assert_same_output(model, theirs, BATCH)
    assert not torch.equal(model.lm_head.weight, original)
    fastlora.unload(model)
    assert torch.equal(model.lm_head.weight, original)
    assert model.__dict__.keys() == llama(True)().__dict__.keys()


def test_embeddings_that_are_the_models_own_change_nothing(tmp_path, caplog):
    theirs = saved_by_peft(tmp_path)
    model = fastlora.patch(llama(True)(), targets=["q_proj"], adapter="other")
    fastlora.load(model, tmp_path)
    assert "replaced" not in caplog.text
    assert_same_output(model, theirs, BATCH)


def test_other_embeddings_under_other_adapters_are_refused(tmp_path):
    saved_by_peft(tmp_path, change=1.0)
    model = fastlora.patch(llama(True)(), targets=["q_proj"], adapter="other")
    before = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=r"found others for \['model.embed_tokens.weight'\], which its adapters"):
        fastlora.load(model, tmp_path)
    assert torch.equal(model.lm_head.weight, before)


def test_two_values_for_one_embedding_are_refused(tmp_path):
    saved_by_peft(tmp_path, change=1.0)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = llama(True)().lm_head.weight.detach()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"one value for model.embed_tokens.weight and lm_head.weight, .* found two"):
        fastlora.load(llama(True)(), tmp_path)


def test_embeddings_of_another_size_are_refused(tmp_path):
    saved_by_peft(tmp_path, vocabulary=99)
    with pytest.raises(ValueError, match=r"shape \[96, 48\], found \[99, 48\]; .*resize_token_embeddings\(99\)"):
        fastlora.load(llama(True)(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_resized_embeddings_travel(target, tied, tmp_path):
    """New rows are nowhere but in the model, so the file has them, as PEFT's has of all but an untargeted head."""
    base = tmp_path / "base"
    llama(tied)().save_pretrained(base)

    def make():
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        torch.manual_seed(2)
        model.resize_token_embeddings(99, mean_resizing=False)
        return model

    def untrained():
        model = transformers.LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(99)
        return model

    batch = {"input_ids": torch.tensor([[1, 97, 98, 5, 96]])}
    ours, theirs = (fill(build(make, settings(target)), 3) for build in (patched, wrapped))
    fastlora.save(fastlora.merge(ours), tmp_path / "ours")
    fastlora.unmerge(ours)
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / writer / "adapter_model.safetensors") for writer in ("ours", "theirs")]
    assert all(torch.equal(files[0][name], value) for name, value in files[1].items())
    assert_same_output(ours, peft.PeftModel.from_pretrained(untrained(), tmp_path / "ours"), batch)
    assert_same_output(fastlora.load(untrained(), tmp_path / "ours"), theirs, batch)
    if tied or target == "q_proj":  # else PEFT leaves the new rows of the head out of its file
        assert_same_output(fastlora.load(untrained(), tmp_path / "theirs"), theirs, batch)
