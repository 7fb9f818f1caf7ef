"""Merging on disk the kinds of weights and adapters that are more than matrices: each as merging in memory does it."""

import json

import peft
import pytest
import torch
import transformers
from checkpoints import (
    change_json,
    contents,
    make_adapter,
    make_base,
    merged_in_memory,
    randomise,
    read,
    save_base,
    weights,
)
from models import make_batch
from safetensors import safe_open
from safetensors.torch import save_file
from test_experts import EXPERTS
from test_experts import make as make_experts

import fastlora
from fastlora.checkpoints.shards import find_shards

# What PEFT says of tied ends and of patterns that match parameters, and of what it reads from transformers.
pytestmark = pytest.mark.filterwarnings("ignore:(Model has `tie|Setting `save_emb|The following|.*checkpointing. is)")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LLAMA = ["q_proj", "v_proj", "down_proj"]


def check(base, adapters, out, argument=None):
    """The merged files load as the model that was merged in memory, and hold the same bits."""
    fastlora.merge_checkpoint(base, argument or adapters, out)
    expected, loaded = merged_in_memory(base, adapters), read(out)
    state = expected.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    batch = make_batch()
    assert torch.equal(loaded.eval()(**batch).logits, expected.eval()(**batch).logits)
    plain = read(base).eval()(**batch).logits
    assert not torch.equal(loaded(**batch).logits, plain)
    find_shards(out)  # an index of just these tensors
    return loaded


# Several adapters

FEATURES = {
    "plain": ({}, {}),
    "ranks": ({"r": 3}, {"r": 5, "use_rslora": True}),
    "dora": ({"use_dora": True}, {}),
    "doras": ({"use_dora": True}, {"use_dora": True, "r": 2}),
    "biases": ({"lora_bias": True}, {"lora_bias": True}),
}


@DTYPES
@pytest.mark.parametrize(
    ("name", "feature"), [*((name, f) for name in ("llama", "gpt2") for f in FEATURES if f != "biases"),
                          ("gpt2", "biases")],
)  # fmt: skip
def test_several_adapters(name, feature, dtype, tmp_path):
    base = make_base(name, dtype, tmp_path / "base")
    targets = LLAMA if name == "llama" else ["c_attn", "c_fc"]
    folders = [
        make_adapter(base, tmp_path / f"adapter{i}", seed=i, target_modules=targets[: 3 - i],
                     fan_in_fan_out=name == "gpt2", **settings)
        for i, settings in enumerate(FEATURES[feature])
    ]  # fmt: skip
    check(base, dict.fromkeys(folders, 1), tmp_path / "out", argument=folders)
    check(base, dict(zip(folders, [0.7, -0.2], strict=True)), tmp_path / "weighted")


def test_adapters_that_exclude_each_other(tmp_path):
    base = make_base("llama", torch.float32, tmp_path / "base")
    settings = dict(target_modules=["q_proj"], modules_to_save=["lm_head"])
    folders = [make_adapter(base, tmp_path / str(seed), seed=seed, **settings) for seed in (1, 2)]
    with pytest.raises(ValueError, match=r"expected one change of lm_head\.weight"):
        fastlora.merge_checkpoint(base, folders, tmp_path / "out")
    with pytest.raises(ValueError, match=r"weight: expected 1 for an adapter that replaces lm_head\.weight"):
        fastlora.merge_checkpoint(base, {folders[0]: 0.5}, tmp_path / "out")
    with pytest.raises(ValueError, match="expected different folders"):
        fastlora.merge_checkpoint(base, [folders[0], folders[0]], tmp_path / "out")
    with pytest.raises(ValueError, match="at least one folder"):
        fastlora.merge_checkpoint(base, [], tmp_path / "out")
    with pytest.raises(ValueError, match="finite weight"):
        fastlora.merge_checkpoint(base, {folders[0]: float("nan")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Int8


@pytest.fixture(scope="module")
def int8_base(tmp_path_factory):
    """A model that transformers loaded in bitsandbytes 8-bit, and saved."""
    folder = tmp_path_factory.mktemp("int8")
    make_base("llama", torch.float16, folder / "dense")
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=settings, dtype=torch.float16
    )
    return save_base(model, folder / "base")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_int8(int8_base, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlora.checkpoints.change.BLOCK", 1000)
    dense = int8_base.with_name("dense")
    folder = make_adapter(dense, tmp_path / "adapter", target_modules=LLAMA, **settings)
    fastlora.merge_checkpoint(int8_base, folder, tmp_path / "out")
    model = fastlora.unload(fastlora.load(read(int8_base), folder), merge=True)
    before, found, expected = weights(int8_base), weights(tmp_path / "out"), model.state_dict()
    assert found.keys() == before.keys()
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"weight", "SCB"}
    assert len(changed) == 12
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, expected[name]), name
    batch = make_batch()
    assert torch.equal(read(tmp_path / "out").eval()(**batch).logits, model.eval()(**batch).logits)
    assert (tmp_path / "out" / "config.json").read_bytes() == (int8_base / "config.json").read_bytes()


def test_int8_whose_scales_are_in_another_file(int8_base, tmp_path):
    """Whichever of the two comes first, also where an earlier call has written one of them."""
    folder = make_adapter(int8_base.with_name("dense"), tmp_path / "adapter", target_modules=LLAMA)
    fastlora.merge_checkpoint(int8_base, folder, tmp_path / "expected")
    split = tmp_path / "split"
    split.mkdir()
    for first in ("SCB", "weight"):
        names = {name: 1 if name.endswith(first) else 2 for name in weights(int8_base)}
        for file in (1, 2):
            tensors = {name: value for name, value in weights(int8_base).items() if names[name] == file}
            save_file(tensors, split / f"model-0000{file}-of-00002.safetensors")
        places = {name: f"model-0000{file}-of-00002.safetensors" for name, file in names.items()}
        (split / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
        fastlora.merge_checkpoint(split, folder, tmp_path / first)
        found, expected = weights(tmp_path / first), weights(tmp_path / "expected")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_int8_that_is_broken(int8_base, tmp_path):
    folder = make_adapter(int8_base.with_name("dense"), tmp_path / "adapter", target_modules=LLAMA)
    base = tmp_path / "base"
    base.mkdir()
    tensors = {name: value for name, value in weights(int8_base).items() if not name.endswith("SCB")}
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match=r"_proj\.SCB with a value per row"):
        fastlora.merge_checkpoint(base, folder, tmp_path / "out")
    tensors = {name: value.fill_(1) if name.endswith("format") else value for name, value in weights(int8_base).items()}
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ValueError, match="weight_format 0"):
        fastlora.merge_checkpoint(base, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Experts


@DTYPES
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "llama4"])
def test_experts(name, dtype, tmp_path):
    """Fused or one by one in the files, `[E, out, in]` or `[E, in, out]`."""
    base = save_base(make_experts(name, dtype=dtype), tmp_path / "base")
    settings = dict(target_modules=["q_proj"], target_parameters=EXPERTS, rank_pattern={"experts.down_proj": 2})
    folder = make_adapter(base, tmp_path / "adapter", r=3, **settings)
    check(base, {folder: 1}, tmp_path / "out", argument=folder)
    assert len(weights(tmp_path / "out")) == len(weights(base))


@pytest.mark.parametrize("targets", [["experts.down_proj"], ["experts.gate_up_proj"]], ids=str)
def test_one_parameter_of_the_experts_and_two_adapters(targets, tmp_path):
    base = save_base(make_experts("gpt_oss"), tmp_path / "base")
    folders = [
        make_adapter(base, tmp_path / str(rank), seed=rank, r=rank, target_modules=[], target_parameters=targets)
        for rank in (2, 3)
    ]
    check(base, dict(zip(folders, [0.5, 2.0], strict=True)), tmp_path / "out")


def test_square_experts_have_the_layout_of_the_others(tmp_path):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, vocab_size=96,
    )  # fmt: skip
    base = save_base(transformers.GptOssForCausalLM(config), tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=["experts.down_proj"])
    check(base, {folder: 1}, tmp_path / "out")


def test_experts_that_do_not_fit(tmp_path):
    base = save_base(make_experts("mixtral"), tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=EXPERTS)
    change_json(folder / "adapter_config.json", r=5)
    with pytest.raises(ValueError, match="expected A and B for target_parameters among"):
        fastlora.merge_checkpoint(base, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Tied ends and trained tokens

TIED = {
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, True),
    "saved-head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 90, 5]}, False),
    "neither": ({"target_modules": ["q_proj"]}, False),
}


@DTYPES
@pytest.mark.parametrize("shards", [True, False])
@pytest.mark.parametrize("case", TIED)
def test_tied_ends(case, shards, dtype, tmp_path):
    settings, unties = TIED[case]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=96,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    base = save_base(transformers.LlamaForCausalLM(config).to(dtype), tmp_path / "base", shards)
    folder = make_adapter(base, tmp_path / "adapter", **settings)
    loaded = check(base, {folder: 1}, tmp_path / "out")
    assert loaded.config.tie_word_embeddings is not unties
    head, embedding = loaded.lm_head.weight, loaded.model.embed_tokens.weight
    assert (head is embedding) is not unties
    assert ("lm_head.weight" in weights(tmp_path / "out")) is unties
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
    if shards and unties:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        total = sum(tensor.numel() * tensor.element_size() for tensor in weights(tmp_path / "out").values())
        assert index["metadata"]["total_size"] == total


def test_tied_ends_of_gpt2(tmp_path):
    base = make_base("gpt2", torch.float32, tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["wte"])
    change_json(base / "config.json", tie_word_embeddings=None)  # as files of older releases have it
    fastlora.merge_checkpoint(base, folder, tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert torch.equal(after["lm_head.weight"], before["transformer.wte.weight"])
    assert not torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = read(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, after["lm_head.weight"])
    assert torch.equal(loaded.transformer.wte.weight, after["transformer.wte.weight"])


@pytest.mark.parametrize("case", ["bare", "unknown-class"])
def test_ties_that_cannot_be_undone(case, tmp_path):
    """Where nothing tells what the head would be called."""
    base = make_base("gpt2", torch.float32, tmp_path / "base")
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["wte"])
    if case == "bare":
        read(base).transformer.save_pretrained(tmp_path / "bare")
        change_json(tmp_path / "bare" / "config.json", architectures=["GPT2LMHeadModel"])
        base = tmp_path / "bare"
    else:
        change_json(base / "config.json", architectures=["SomethingElse"])
    with pytest.raises(ValueError, match="tied"):
        fastlora.merge_checkpoint(base, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_of_two_adapters(tmp_path):
    base = make_base("llama", torch.float32, tmp_path / "base")
    folders = [
        make_adapter(base, tmp_path / str(seed), seed=seed, target_modules=["q_proj"], trainable_token_indices=tokens)
        for seed, tokens in enumerate([[7, 3], {"embed_tokens": [95, 0]}, [0]])
    ]
    check(base, dict.fromkeys(folders[:2], 1), tmp_path / "out")
    with pytest.raises(ValueError, match=r"different trained tokens, found \[0\]"):
        fastlora.merge_checkpoint(base, folders, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# Convolutions


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=str)
def test_convolutions(settings, tmp_path):
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, do_stable_layer_norm=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = save_base(transformers.Wav2Vec2Model(config), tmp_path / "base", shards=False)
    model = transformers.Wav2Vec2Model.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*conv_layers.*\.conv", **settings))
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    fastlora.merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    expected = transformers.Wav2Vec2Model.from_pretrained(base)
    expected = fastlora.unload(fastlora.load(expected, tmp_path / "adapter"), merge=True).state_dict()
    found, before = weights(tmp_path / "out"), weights(base)
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) == 2
    assert all(torch.equal(found[name], expected[name]) for name in changed)


def test_grouped_convolutions_are_refused(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    for place in (base, folder):
        place.mkdir()
    save_file({"c.conv.weight": torch.ones(8, 2, 3)}, base / "model.safetensors")
    parts = {"A.weight": torch.ones(2, 4, 3), "B.weight": torch.ones(8, 1, 1)}
    tensors = {f"base_model.model.c.conv.lora_{part}": value for part, value in parts.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "target_modules": ["conv"]}))
    with pytest.raises(ValueError, match=r"lora_A.weight: expected shape \[2, 3\], found \[4, 3\]"):
        fastlora.merge_checkpoint(base, folder, tmp_path / "out")
    assert contents(base).keys() == {"model.safetensors"}
