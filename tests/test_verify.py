"""Verifying passes what is right, whoever merged it, and finds what is not."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from exports import SMALL, llama_pair, make_pair, read, weights
from models import make_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app

FEATURES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "saved": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
Q = "model.layers.0.self_attn.q_proj."


def merged_by_peft(base: Path, adapter: Path, out: Path) -> Path:
    peft.PeftModel.from_pretrained(read(base), adapter).merge_and_unload().save_pretrained(out)
    return out


def edit(folder: Path, name: str, change) -> None:
    """Changes one tensor in the file that has it; `change` gives None to leave it out."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = change(tensors.pop(name).clone())
            save_file(tensors | ({} if changed is None else {name: changed}), file, metadata={"format": "pt"})
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places(folder)}))
            return
    raise AssertionError(name)


def places(folder: Path) -> dict[str, str]:
    return {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_merges_of_ours_and_of_peft_pass(feature, dtype, tmp_path):
    base, adapter = llama_pair(tmp_path, dtype, **FEATURES[feature])
    fastlora.merge_checkpoint(base, adapter, tmp_path / "ours")
    for merged in (tmp_path / "ours", merged_by_peft(base, adapter, tmp_path / "theirs")):
        found = fastlora.verify_checkpoint(base, adapter, merged)
        assert found.ok, found.problems
        assert found.format == "dense"
        assert {check.name for check in found.tensors} == weights(base).keys()
        assert {check.kind for check in found.tensors} == {"copied", "merged"}


def test_conv1d_and_small_blocks(tmp_path, monkeypatch):
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}
    base, adapter = make_pair(make_model("gpt2", torch.bfloat16), tmp_path, **settings)
    fastlora.merge_checkpoint(base, adapter, tmp_path / "out")
    whole = fastlora.verify_checkpoint(base, adapter, tmp_path / "out")
    monkeypatch.setattr("fastlora.checkpoints.change.BLOCK", 100)
    monkeypatch.setattr("fastlora.checkpoints.convert.CACHED", 100)
    monkeypatch.setattr("fastlora.checkpoints.shards.CHUNK", 100)
    calls = []
    found = fastlora.verify_checkpoint(base, adapter, tmp_path / "out", progress=lambda *sizes: calls.append(sizes))
    assert found.ok
    # Only the sums of squares are formed in other blocks.
    assert [(check.name, check.error) for check in found.tensors] == [
        (check.name, check.error) for check in whole.tensors
    ]
    assert calls[-1][0] == calls[-1][1]


def test_experts_and_tied_embeddings(tmp_path):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=3, **SMALL)
    settings = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    base, adapter = make_pair(transformers.MixtralForCausalLM(config), tmp_path / "experts", **settings)
    fastlora.export_checkpoint(base, adapter, tmp_path / "experts" / "out")
    assert fastlora.verify_checkpoint(base, adapter, tmp_path / "experts" / "out").ok
    config = transformers.Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    model = transformers.Qwen2ForCausalLM(config)
    base, adapter = make_pair(model, tmp_path / "tied", target_modules=["embed_tokens", "q_proj"])
    for to in ("bf16", "int8"):
        fastlora.export_checkpoint(base, adapter, tmp_path / "tied" / to, to=to)
        found = fastlora.verify_checkpoint(base, adapter, tmp_path / "tied" / to)
        assert found.ok, found.problems
        assert "lm_head.weight" in {check.name for check in found.tensors}
        expected = fastlora.unload(fastlora.load(read(base), adapter), merge=True)
        difference = read(tmp_path / "tied" / to).lm_head.weight - expected.lm_head.weight
        assert difference.abs().max() <= torch.finfo(torch.bfloat16).eps * expected.lm_head.weight.abs().max()


def test_several_adapters_and_an_int8_base(tmp_path):
    base, first = llama_pair(tmp_path)
    _, second = llama_pair(tmp_path / "other", r=2, lora_alpha=3)
    adapters = {first: 0.5, second: 2.0}
    for to in ("bf16", "int8"):
        fastlora.export_checkpoint(base, adapters, tmp_path / to, to=to)
        assert fastlora.verify_checkpoint(base, adapters, tmp_path / to).ok
        assert not fastlora.verify_checkpoint(base, {first: 1.0, second: 1.0}, tmp_path / to).ok
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    loaded.save_pretrained(tmp_path / "int8-base")
    fastlora.merge_checkpoint(tmp_path / "int8-base", first, tmp_path / "again")
    found = fastlora.verify_checkpoint(tmp_path / "int8-base", first, tmp_path / "again")
    assert found.ok, found.problems
    assert found.worst.kind == "int8"
    assert not fastlora.verify_checkpoint(tmp_path / "int8-base", second, tmp_path / "again").ok
    with pytest.raises(ValueError, match="expected dense weights for 'int8'"):
        fastlora.export_checkpoint(tmp_path / "int8-base", first, tmp_path / "refused")


@pytest.mark.parametrize("to", ["bf16", "fp16", "fp32", "int8", "w8a8", "bnb8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exports_pass_and_other_adapters_do_not(to, dtype, tmp_path):
    base, adapter = llama_pair(tmp_path, dtype)
    report = fastlora.export_checkpoint(base, adapter, tmp_path / "out", to=to)
    found = fastlora.verify_checkpoint(base, adapter, tmp_path / "out")
    assert found.ok, found.problems
    errors = {check.name: check.relative_rms for check in found.tensors if check.kind == "int8"}
    assert errors == {error.name: error.relative_rms for error in report.errors}
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 1.25}))
    wrong = {check.name for check in fastlora.verify_checkpoint(base, adapter, tmp_path / "out").problems}
    assert wrong == {f"{name.removeprefix('base_model.model.')[:-14]}.weight" for name in weights(adapter)}


WRONG = {
    "a bit of a copied tensor": ("bf16", "model.norm.weight", lambda t: t.view(torch.int16).add_(1).view(t.dtype)),
    "a value": ("bf16", f"{Q}weight", lambda t: t.index_fill_(0, torch.tensor(3), 0.5)),
    "nan": ("bf16", f"{Q}weight", lambda t: t.index_fill_(0, torch.tensor(3), float("nan"))),
    "a shape": ("bf16", f"{Q}weight", lambda t: t[:-1].contiguous()),
    "a missing tensor": ("bf16", f"{Q}weight", lambda t: None),
    "codes": ("w8a8", f"{Q}weight", lambda t: t + t.clamp(-1, 1)),
    "packed codes": ("int8", f"{Q}weight_packed", lambda t: t + 2),
    "a scale": ("int8", f"{Q}weight_scale", lambda t: t * 1.02),
    "a dtype": ("int8", f"{Q}weight_scale", lambda t: t.double()),
    "a stored shape": ("int8", f"{Q}weight_shape", lambda t: t.flip(0) + 1),
    "a missing scale": ("int8", f"{Q}weight_scale", lambda t: None),
    "absmax": ("bnb8", f"{Q}SCB", lambda t: t * 1.02),
    "a layout": ("bnb8", f"{Q}weight_format", lambda t: t + 1),
}


@pytest.mark.parametrize(("to", "name", "change"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_found(to, name, change, tmp_path):
    base, adapter = llama_pair(tmp_path, torch.bfloat16)
    out = tmp_path / "out"
    fastlora.export_checkpoint(base, adapter, out, to=to)
    edit(out, name, change)
    found = fastlora.verify_checkpoint(base, adapter, out)
    module = name.rpartition(".")[0]
    assert {check.name.rpartition(".")[0] for check in found.problems} == {module}
    assert found.worst.problem is not None


def test_other_tensors_formats_and_folders(tmp_path):
    base, adapter = llama_pair(tmp_path)
    out = tmp_path / "out"
    fastlora.merge_checkpoint(base, adapter, out)
    file = next(out.glob("*.safetensors"))
    save_file(load_file(file) | {"more": torch.ones(2)}, file, metadata={"format": "pt"})
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places(out)}))
    (problem,) = fastlora.verify_checkpoint(base, adapter, out).problems
    assert (problem.name, problem.kind) == ("more", "extra")
    settings = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"quantization_config: expected one of .*pack-quantized.*found 'gptq'"):
        fastlora.verify_checkpoint(base, adapter, out)
    with pytest.raises(ValueError, match=r"expected model\.safetensors"):
        fastlora.verify_checkpoint(base, adapter, tmp_path)


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_the_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # pytest-xdist sets fewer, which cut long names
    base, adapter = llama_pair(tmp_path, torch.bfloat16)
    out = tmp_path / "out"
    code, output = run("export", base, adapter, out, "--to", "int8")
    assert code == 0
    assert "relative RMS error" in output
    assert "down_proj.weight" in output
    assert "exported as int8" in output
    code, output = run("verify", base, adapter, out)
    assert code == 0
    assert "pack-quantized, 7 copied, 14 int8: every tensor is base + adapter" in output
    edit(out, f"{Q}weight_packed", lambda words: words + 2)
    code, output = run("verify", base, adapter, out)
    assert code == 1
    assert "1 of 21 tensors are wrong" in output
    assert Q in next(line for line in output.splitlines() if "weight" in line)
    code, output = run("verify", base, adapter, out, "--json")
    assert code == 1
    found = json.loads(output)
    assert "NaN" not in output
    assert (found["ok"], found["worst"], found["format"]) == (False, f"{Q}weight", "pack-quantized")
    code, output = run("export", base, adapter, tmp_path / "portable", "--portable", "--json")
    assert code == 0
    assert json.loads(output)["format"] == "portable"
    for arguments in (("export", base, adapter, out), ("verify", base, adapter, tmp_path / "nowhere")):
        code, output = run(*arguments)
        assert code == 2
        assert output.startswith("error: ")
