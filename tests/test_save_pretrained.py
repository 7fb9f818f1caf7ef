"""`save_pretrained` of a model in each state, and taking the override off again."""

import copy
import io
import pickle

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import make_model
from safetensors.torch import load_file
from training import TARGETS, assert_same, logits, saved_base, trained
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import fastlora


def patched(folder, dtype=torch.float32, **settings):
    """A patched model whose adapter changes something."""
    model = fastlora.patch(saved_base(folder / "base", dtype=dtype), r=4, targets=TARGETS, **settings)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_saved_whole(dtype, tmp_path):
    model = patched(tmp_path, dtype)
    fastlora.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(make_model("llama").state_dict())
    fastlora.unload(model, merge=True)
    assert_same(plain.state_dict(), model.state_dict())


def test_merged_int8_is_saved_dense_with_its_values(tmp_path):
    model = patched(tmp_path, quantize="int8")
    fastlora.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    exact = copy.deepcopy(plain).double()
    assert_as_accurate_as_eager(logits(model), logits(plain), logits(exact))


def test_merged_4bit_is_saved_dense_with_its_values(tmp_path):
    saved_base(tmp_path / "base", dtype=torch.bfloat16)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    fastlora.patch(model, r=4, targets=["q_proj"])
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B["default"])
    fastlora.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(plain.config, "quantization_config")
    exact = copy.deepcopy(plain).double()
    assert_as_accurate_as_eager(logits(model), logits(plain), logits(exact))


def test_merged_with_untied_embedding(tmp_path):
    base = make_model("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    model = fastlora.patch(base, r=4, targets=["embed_tokens"])
    torch.nn.init.normal_(model.model.embed_tokens.lora_A["default"])
    torch.nn.init.normal_(model.model.embed_tokens.lora_B["default"])
    fastlora.merge(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_merged_and_disabled_is_refused(tmp_path):
    model = patched(tmp_path)
    fastlora.merge(model)
    with fastlora.disabled(model), pytest.raises(ValueError, match="expected enabled adapters"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_adapters_left_it_is_saved_whole(tmp_path):
    model = patched(tmp_path)
    fastlora.delete_adapter(model, "default")
    model.save_pretrained(tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), saved_base(tmp_path / "base").state_dict())


def test_unload_takes_everything_off(tmp_path):
    plain = make_model("llama")
    before = set(plain.__dict__), plain.state_dict().keys()
    model = fastlora.unload(fastlora.patch(plain, targets=["q_proj", "lm_head"], allow_output_head=True))
    assert (set(model.__dict__), model.state_dict().keys()) == before
    assert not model._load_state_dict_post_hooks
    assert not model._forward_pre_hooks
    model.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), model.state_dict())


def test_patching_twice_installs_once():
    model = make_model("llama")
    for adapter in ("default", "second"):
        fastlora.patch(model, targets=["q_proj", "lm_head"], allow_output_head=True, adapter=adapter)
    assert len(model._load_state_dict_post_hooks) == len(model._forward_pre_hooks) == 1


def test_several_adapters_are_all_in_the_checkpoint(tmp_path):
    model = patched(tmp_path)
    fastlora.patch(model, r=2, targets=["k_proj"], adapter="second")
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "second" / "adapter_model.safetensors").is_file()
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in state} == {"default", "second"}


def test_state_dict_is_honoured(tmp_path):
    model = patched(tmp_path)
    given = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=given)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(state, {name: given[name] for name in trained(model)})
    of_peft = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = of_peft["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(found, given["model.layers.0.self_attn.q_proj.lora_A.default"])


def test_state_dict_without_the_adapter_is_refused(tmp_path):
    model = patched(tmp_path)
    with pytest.raises(ValueError, match=r"state_dict: expected all 12 tensors .* found 12 of them missing"):
        model.save_pretrained(tmp_path / "out", state_dict={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["push_to_hub", "variant", "distributed_checkpoint"])
def test_options_that_cannot_be_honoured_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name}: expected none"):
        patched(tmp_path).save_pretrained(tmp_path / "out", **{name: "fp16"})
    assert not (tmp_path / "out").exists()


def test_other_processes_write_nothing(tmp_path):
    patched(tmp_path).save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def pickled(model):
    return pickle.load(io.BytesIO(pickle.dumps(model)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["copied", "pickled"])
def test_a_copy_saves_itself(duplicate, tmp_path):
    model = patched(tmp_path)
    other = duplicate(model)
    torch.nn.init.zeros_(other.model.layers[0].self_attn.q_proj.lora_A["default"])
    other.save_pretrained(tmp_path / "out")
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), trained(other))


def test_a_compiled_model_saves_the_same(tmp_path):
    model = patched(tmp_path)
    compiled = torch.compile(model, backend="eager")
    compiled.save_pretrained(tmp_path / "out", state_dict=compiled.state_dict())
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), trained(model))


def test_loaded_adapters_save_as_patched_ones_do(tmp_path):
    model = patched(tmp_path)
    model.save_pretrained(tmp_path / "first")
    again = fastlora.load(saved_base(tmp_path / "base"), tmp_path / "first", trainable=True)
    again.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "adapter_model.safetensors"):
        assert_same(load_file(tmp_path / "second" / name), load_file(tmp_path / "first" / name))
