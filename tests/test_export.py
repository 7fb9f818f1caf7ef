"""Exports hold what the libraries would write of the merged model, and load as it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from exports import (
    SMALL,
    compressed_by_the_library,
    llama_pair,
    logits,
    make_pair,
    merged_model,
    quantized_by_bitsandbytes,
    read,
    same_tensors,
    settings_of,
    weights,
)
from models import make_model
from safetensors import safe_open
from safetensors.torch import save_file

import fastlora
from fastlora.checkpoints.int8 import INT8_FORMATS, unpack

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MERGED = ("bf16", "int8", "w8a8", "bnb8")


@pytest.fixture
def pair(tmp_path):
    return llama_pair(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", DTYPES)
def test_dense_exports_are_the_merge_rounded_once(to, dtype, tmp_path):
    base, adapter = llama_pair(tmp_path, dtype)
    fastlora.export_checkpoint(base, adapter, tmp_path / "out", to=to)
    expected = {
        name: tensor.to(DTYPES[to]) for name, tensor in merged_model(base, adapter, torch.float32).state_dict().items()
    }
    same_tensors(weights(tmp_path / "out"), expected)
    loaded = read(tmp_path / "out")
    assert loaded.dtype == DTYPES[to]
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[to])
    reference.load_state_dict(expected)
    assert torch.equal(logits(loaded), logits(reference))


def test_a_dense_export_in_the_base_s_dtype_holds_the_tensors_of_a_merge(tmp_path):
    base, adapter = llama_pair(tmp_path, torch.bfloat16, use_dora=True)
    fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="bf16")
    fastlora.merge_checkpoint(base, adapter, tmp_path / "merged")
    same_tensors(weights(tmp_path / "out"), weights(tmp_path / "merged"))
    assert settings_of(tmp_path / "out") == settings_of(base)
    kept = {file.name for file in base.iterdir()} - {"optimizer.bin"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == kept


@pytest.mark.parametrize(("to", "activations"), [("int8", False), ("w8a8", True)])
def test_int8_is_what_compressed_tensors_writes(to, activations, pair, tmp_path):
    out = tmp_path / "out"
    fastlora.export_checkpoint(*pair, out, to=to)
    theirs = compressed_by_the_library(merged_model(*pair), tmp_path / "theirs", activations)
    same_tensors(weights(out), weights(theirs))
    found, expected = settings_of(out)["quantization_config"], settings_of(theirs)["quantization_config"]
    assert found == expected
    assert logits(read(out)).equal(logits(read(theirs)))


def test_bnb8_is_what_bitsandbytes_writes(pair, tmp_path):
    out = tmp_path / "out"
    fastlora.export_checkpoint(*pair, out, to="bnb8")
    theirs = quantized_by_bitsandbytes(merged_model(*pair), tmp_path / "theirs")
    same_tensors(weights(out), weights(theirs))
    found, expected = settings_of(out)["quantization_config"], settings_of(theirs)["quantization_config"]
    # None makes transformers look for the head; a list is also right where there is more to leave out.
    assert found == expected | {"llm_int8_skip_modules": ["lm_head"]}
    torch.testing.assert_close(logits(read(out)), logits(read(theirs)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_loads_as_its_dequantised_weights(dtype, tmp_path):
    base, adapter = llama_pair(tmp_path, dtype)
    fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="int8")
    assert weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_scale"].dtype == dtype
    reference = read(dequantised(tmp_path / "out", base, tmp_path / "dense"))
    assert torch.equal(logits(read(tmp_path / "out")), logits(reference))


def test_conv1d_goes_into_bnb8_alone(tmp_path):
    targets = ["c_attn", "c_fc", "c_proj"]
    base, adapter = make_pair(make_model("gpt2"), tmp_path, target_modules=targets, fan_in_fan_out=True)
    fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="bnb8")
    theirs = quantized_by_bitsandbytes(merged_model(base, adapter), tmp_path / "theirs")
    same_tensors(weights(tmp_path / "out"), weights(theirs))
    torch.testing.assert_close(logits(read(tmp_path / "out")), logits(read(theirs)), rtol=0, atol=1e-6)
    assert fastlora.verify_checkpoint(base, adapter, tmp_path / "out").ok
    with pytest.raises(ValueError, match="linear layers that pack-quantized has, found none"):
        fastlora.export_checkpoint(base, adapter, tmp_path / "refused", to="int8")
    assert not (tmp_path / "refused").exists()


def dequantised(exported: Path, base: Path, out: Path) -> Path:
    """A dense checkpoint of `codes * scale` in the model's dtype."""
    tensors = weights(exported)
    for name in [name for name in tensors if name.endswith("_packed")]:
        module = name.removesuffix("weight_packed")
        codes = unpack(tensors.pop(name), int(tensors.pop(f"{module}weight_shape")[1]))
        scale = tensors.pop(f"{module}weight_scale")
        tensors[f"{module}weight"] = codes.to(scale.dtype) * scale
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", out)
    return out


@pytest.mark.parametrize("to", ["int8", "bnb8"])
def test_experts(to, tmp_path):
    """Files hold experts one by one, and models all in one tensor: pack-quantized alone is read from the former."""
    config = transformers.MixtralConfig(num_key_value_heads=2, num_local_experts=3, **SMALL)
    torch.manual_seed(0)
    base, adapter = make_pair(transformers.MixtralForCausalLM(config), tmp_path, target_modules=["q_proj", "o_proj"])
    report = fastlora.export_checkpoint(base, adapter, tmp_path / "out", to=to)
    in_int8 = {error.name for error in report.errors}
    assert any(".experts.2.w1." in name for name in in_int8) == (to == "int8")
    assert not any("gate.weight" in name or "lm_head" in name for name in in_int8)
    assert fastlora.verify_checkpoint(base, adapter, tmp_path / "out").ok
    loaded = read(tmp_path / "out")
    if to == "bnb8":
        same_tensors(
            weights(tmp_path / "out"), weights(quantized_by_bitsandbytes(merged_model(base, adapter), tmp_path))
        )
    else:
        assert torch.equal(logits(loaded), logits(read(dequantised(tmp_path / "out", base, tmp_path / "dense"))))
    if to == "int8":
        with pytest.raises(ValueError, match="expected a model without experts for int-quantized"):
            fastlora.export_checkpoint(base, adapter, tmp_path / "refused", to="w8a8")


def test_tied_heads_and_unknown_classes(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **SMALL)
    base, adapter = make_pair(transformers.Qwen2ForCausalLM(config), tmp_path)
    fastlora.export_checkpoint(base, adapter, tmp_path / "out")
    assert settings_of(tmp_path / "out")["quantization_config"]["ignore"] == ["lm_head"]
    logits(read(tmp_path / "out"))
    (base / "config.json").write_text(json.dumps(settings_of(base) | {"architectures": ["SomebodysForCausalLM"]}))
    fastlora.export_checkpoint(base, adapter, tmp_path / "named")
    same_tensors(weights(tmp_path / "named"), weights(tmp_path / "out"))


def test_files_and_index(pair, tmp_path):
    """The same files as the base, tensors aligned and found where the index says."""
    base, out = pair[0], tmp_path / "out"
    report = fastlora.export_checkpoint(*pair, out, to="int8")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()} - {"optimizer.bin"}
    places = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}
            places |= dict.fromkeys(reader.keys(), file.name)
        header = json.loads(file.read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}")
        start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        widths = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2}
        for name, values in header.items():
            if name != "__metadata__":
                assert (start + values["data_offsets"][0]) % widths[values["dtype"]] == 0
    assert index["weight_map"] == places
    stored = weights(out)
    before = json.loads((base / "model.safetensors.index.json").read_text())["metadata"]
    assert index["metadata"]["total_parameters"] == before["total_parameters"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert report.bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))


@pytest.mark.parametrize("to", ["int8", "w8a8", "bnb8"])
def test_the_error_of_each_layer(to, pair, tmp_path):
    """As float64 says from the files, and that of quantising the float32 merge."""
    report = fastlora.export_checkpoint(*pair, tmp_path / "out", to=to)
    stored, format = weights(tmp_path / "out"), INT8_FORMATS[to]
    exact = merged_model(*pair).state_dict()
    assert len(report.errors) == 14
    for error in report.errors:
        w = exact[error.name]
        module = error.name.removesuffix("weight")
        parts = {part: stored[module + part] for part in format.specs(*w.shape, "F32")}
        found = format.dequantize(parts, w.shape[1]).double()
        expected = ((found - w.double()).norm() / w.double().norm()).item()
        assert error.relative_rms == pytest.approx(expected, rel=1e-5)  # sums of float32 squares, and a float32 product
    assert report.worst.relative_rms == max(error.relative_rms for error in report.errors)
    assert json.loads(json.dumps(report.to_dict()))["format"] == to


@pytest.mark.parametrize("to", ["bf16", "int8", "bnb8"])
def test_an_interrupted_export_goes_on(to, pair, tmp_path, monkeypatch):
    whole = fastlora.export_checkpoint(*pair, tmp_path / "whole", to=to)
    out, replace, done = tmp_path / "out", os.replace, []

    def fail_at_third(source, target):
        done.append(target)
        if len(done) == 4:  # the manifest and two files of weights are there
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail_at_third)
        with pytest.raises(OSError, match="disk full"):
            fastlora.export_checkpoint(*pair, out, to=to)
    assert not (out / "config.json").exists()
    left = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(left) == 2
    with pytest.raises(ValueError, match="an interrupted merge of these inputs"):
        fastlora.export_checkpoint(*pair, out, to="w8a8")
    assert fastlora.export_checkpoint(*pair, out, to=to) == whole
    assert left.items() <= {file.name: file.stat().st_mtime_ns for file in out.iterdir()}.items()
    contents = [{file.name: file.read_bytes() for file in folder.iterdir()} for folder in (out, tmp_path / "whole")]
    assert contents[0] == contents[1]


def test_small_blocks_give_the_same_files(pair, tmp_path, monkeypatch):
    fastlora.export_checkpoint(*pair, tmp_path / "whole")
    monkeypatch.setattr("fastlora.checkpoints.change.BLOCK", 100)
    monkeypatch.setattr("fastlora.checkpoints.convert.CACHED", 100)
    calls = []
    report = fastlora.export_checkpoint(*pair, tmp_path / "out", progress=lambda *sizes: calls.append(sizes))
    same_tensors(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert calls[-1] == (report.bytes, report.bytes)
    assert calls == sorted(calls)


@pytest.mark.parametrize("to", MERGED)
def test_a_merged_weight_that_is_not_finite_leaves_nothing(to, tmp_path):
    base, adapter = llama_pair(tmp_path, torch.bfloat16)
    tensors = weights(adapter)
    for tensor in tensors.values():
        tensor.fill_(1e30)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="expected finite merged weights"):
        fastlora.export_checkpoint(base, adapter, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_weights_beyond_float16(tmp_path):
    base, adapter = llama_pair(tmp_path, torch.bfloat16)
    tensors = weights(adapter)
    for tensor in tensors.values():
        tensor.fill_(1e3)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"merged weights in the range of torch\.float16, found"):
        fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="fp16")
    assert not (tmp_path / "out").exists()


def test_refused(pair, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"to: expected one of .*'portable'.*found 'gguf'"):
        fastlora.export_checkpoint(*pair, out, to="gguf")
    with pytest.raises(ValueError, match="device: expected one of this machine"):
        fastlora.export_checkpoint(*pair, out, device="nowhere")
    with pytest.raises(ValueError, match="text: expected a tokenizer"):
        fastlora.export_checkpoint(*pair, out, text="some text")
    with pytest.raises(ValueError, match="text: expected with a merged format, found with 'peft'"):
        fastlora.export_checkpoint(*pair, out, to="peft", text="some text")
    assert not out.exists()
    out.mkdir()
    (out / "mine").write_text("")
    for to in ("int8", "bf16", "portable"):
        with pytest.raises(ValueError, match="out: expected a new folder"):
            fastlora.export_checkpoint(*pair, out, to=to)
    assert [file.name for file in out.iterdir()] == ["mine"]


def test_perplexity_of_a_text(tmp_path):
    """As the models themselves say, each token given those before it in its window."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **SMALL | {"vocab_size": 384})
    base, adapter = make_pair(transformers.LlamaForCausalLM(config), tmp_path)
    transformers.ByT5Tokenizer().save_pretrained(base)
    text = "The quick brown fox jumps over the lazy dog. " * 4
    report = fastlora.export_checkpoint(base, adapter, tmp_path / "out", to="int8", text=text)
    ids = torch.tensor(transformers.ByT5Tokenizer()(text).input_ids)
    for found, model in zip(report.perplexity, (merged_model(base, adapter), read(tmp_path / "out")), strict=True):
        total = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(ids) - 1, 63):
                window = ids[None, start : start + 64]
                total += model(window, labels=window).loss.double() * (window.shape[1] - 1)
        assert found == pytest.approx((total / (len(ids) - 1)).exp().item(), rel=1e-6)  # means in float32
    with pytest.raises(ValueError, match="text: expected at least two tokens"):
        fastlora.export_checkpoint(base, adapter, tmp_path / "empty", text="")
