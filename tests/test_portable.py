"""Adapters that other tools read: one rank, one scale, the names of the base; and what they cannot say."""

import json

import peft
import pytest
import torch
from exports import llama_pair, logits, make_pair, read, weights
from models import VOCABULARY, make_model
from safetensors.torch import save_file

import fastlora
from fastlora.config import LoraConfig
from fastlora.models.targets import scaling_of

PREFIX = "base_model.model."
ALL = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {"layers.0.*q_proj": 2, "down_proj": 6}, "alpha_pattern": {"down_proj": 5}}


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def updates(folder) -> dict[str, torch.Tensor]:
    """`lora_alpha / r * B A` in float64, the scale and ranks as llama.cpp and vLLM take them."""
    config, tensors = config_of(folder), weights(folder)
    assert {name.rpartition("lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    return {
        module: config["lora_alpha"] / config["r"] * tensors[f"{module}.lora_B.weight"].double()
        @ tensors[f"{module}.lora_A.weight"].double()
        for module in modules
    }  # fmt: skip


@pytest.mark.parametrize("scale", [6, 8], ids=["rounded", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_portable_adapters_say_the_same(settings, dtype, scale, tmp_path):
    base, adapter = llama_pair(tmp_path, lora_alpha=scale, **settings)
    tensors = {name: tensor.to(dtype) for name, tensor in weights(adapter).items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    report = fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="portable")
    out = tmp_path / "out"
    config, ranks = config_of(out), {t.shape[0] for n, t in weights(out).items() if ".lora_A." in n}
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert (ranks, config["lora_alpha"]) == ({config["r"]}, config["r"])
    found = updates(out)
    assert found.keys() == {name.rpartition(".lora_")[0] for name in tensors}
    for name, update in found.items():
        factor = scaling_of(LoraConfig.from_folder(adapter), name.removeprefix(PREFIX))
        a, b = (tensors[f"{name}.lora_{part}.weight"].double() for part in "AB")
        # Rounded once, in float32, if the scale is no power of two.
        bound = 0.0 if (scale, settings) == (8, {}) else 2**-24 * abs(factor) * (b.abs() @ a.abs())
        assert ((update - factor * b @ a).abs() <= bound).all(), name
    original = peft.PeftModel.from_pretrained(read(base), adapter)
    again = peft.PeftModel.from_pretrained(read(base), out)
    exact = logits(peft.PeftModel.from_pretrained(read(base).double(), adapter))
    # PEFT multiplies by the scale last: the two round at other places.
    allowed = 4 * (logits(original) - exact).abs().max()
    assert (logits(again) - exact).abs().max() <= allowed
    assert any("in B now" in note for note in report.notes)


def test_fused_projections_become_those_of_the_base(tmp_path):
    base, adapter = llama_pair(tmp_path, target_modules=ALL, bias="none")
    tensors = weights(adapter)
    fused: dict[str, torch.Tensor] = {}
    for layer in range(2):
        path = f"{PREFIX}model.layers.{layer}."
        for whole, parts in {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        }.items():
            rows = [tensors[f"{path}{part}.lora_B.weight"] for part in parts]
            fused[f"{path}{whole}.lora_A.weight"] = tensors[f"{path}{parts[0]}.lora_A.weight"]
            fused[f"{path}{whole}.lora_B.weight"] = torch.cat(rows)
    save_file(fused, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"(qkv|gate_up)_proj\.weight' in the base, found none"):
        fastlora.export_checkpoint(base, adapter, tmp_path / "refused", to="peft")
    report = fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="portable")
    assert "qkv_proj became q_proj, k_proj, v_proj" in report.notes
    found = updates(tmp_path / "out")
    assert {name.rpartition(".")[2] for name in found} == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    for name, update in found.items():
        a = fused[f"{PREFIX}{name.removeprefix(PREFIX).rpartition('.')[0]}." + (
            "qkv_proj" if "self_attn" in name else "gate_up_proj") + ".lora_A.weight"]  # fmt: skip
        b = tensors[f"{name}.lora_B.weight"]
        expected = 6 / 4 * b.double() @ a.double()
        assert ((update - expected).abs() <= 2**-24 * 1.5 * (b.abs().double() @ a.abs().double())).all()
    peft.PeftModel.from_pretrained(read(base), tmp_path / "out")
    fused[f"{PREFIX}model.layers.0.self_attn.qkv_proj.lora_B.weight"] = torch.ones(90, 4)
    save_file(fused, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected 96 rows for"):
        fastlora.export_checkpoint(base, adapter, tmp_path / "short", to="portable")


NOT_PORTABLE = {
    "use_dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "embed_tokens": {"target_modules": ["embed_tokens", "q_proj"]},
    "q_proj.base_layer.bias|q_proj.bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize(("name", "settings"), NOT_PORTABLE.items(), ids=NOT_PORTABLE.keys())
def test_what_is_not_portable_is_refused_by_name(name, settings, tmp_path):
    model = make_model("qwen2" if "bias" in settings else "llama")
    pair = make_pair(model, tmp_path, **{"target_modules": ["q_proj"]} | settings)
    with pytest.raises(ValueError, match=rf"({name}).*merged model instead"):
        fastlora.export_checkpoint(*pair, tmp_path / "out", to="portable")
    assert not (tmp_path / "out").exists()
    fastlora.export_checkpoint(*pair, tmp_path / "peft", to="peft")


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, PATTERNS], ids=str)
def test_peft_adapters_are_themselves(settings, tmp_path):
    base, adapter = llama_pair(tmp_path, init_lora_weights="gaussian", **settings)
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "optimizer.pt").write_bytes(b"pickle")
    fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="peft")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
    }  # fmt: skip
    expected, found = weights(adapter), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert config_of(tmp_path / "out")["init_lora_weights"] is True
    models = [peft.PeftModel.from_pretrained(read(base), folder) for folder in (adapter, tmp_path / "out")]
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_what_is_the_base_s_own_is_left_out(tmp_path):
    base, adapter = llama_pair(tmp_path)
    own = weights(base)
    tensors = weights(adapter)
    copies = {f"{PREFIX}{name}": own[name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors | copies, adapter / "adapter_model.safetensors")
    report = fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="peft")
    assert weights(tmp_path / "out").keys() == tensors.keys()
    assert all(name in report.notes[0] for name in copies)
    trained = {f"{PREFIX}lm_head.weight": torch.ones(VOCABULARY, 48)}
    save_file(tensors | trained, adapter / "adapter_model.safetensors")
    fastlora.export_checkpoint(base, adapter, tmp_path / "resized", to="peft")
    assert weights(tmp_path / "resized").keys() == tensors.keys() | trained.keys()


def test_several_adapters_are_not_one(tmp_path):
    base, first = llama_pair(tmp_path)
    _, second = llama_pair(tmp_path / "other")
    with pytest.raises(ValueError, match="adapter: expected one of weight 1 for 'portable', found 2"):
        fastlora.export_checkpoint(base, [first, second], tmp_path / "out", to="portable")
