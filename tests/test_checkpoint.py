"""Merging on disk: the same bits as merging in memory, and a folder that is whole or not there."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
from models import make_batch, make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastlora
from fastlora.checkpoint import MANIFEST
from fastlora.cli import app

LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "c_proj", "c_fc"]
FEATURES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.*q_proj|h.1.*c_attn": 2}, "alpha_pattern": {"down_proj|c_fc": 3}},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
}


def randomise(model) -> None:
    """Values for everything that an adapter trains, which zeros would hide."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(parameter.data + change.to(parameter.dtype))


def make_adapter(base: Path, folder: Path, seed: int = 0, **settings) -> Path:
    """A trained adapter, written by PEFT."""
    model = peft.get_peft_model(read(base), peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | settings)))
    randomise(model)
    model.save_pretrained(folder)
    return folder


def make_base(name: str, dtype: torch.dtype, folder: Path, shards: bool = True) -> Path:
    model = make_model(name, dtype)
    model.save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "optimizer.bin").write_bytes(b"pickle")
    return folder


def read(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def weights(folder: Path) -> dict:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def check_merged(base: Path, adapter: Path, out: Path) -> None:
    """The files hold what merging in memory gives, laid out as in the base."""
    fastlora.merge_checkpoint(base, adapter, out)
    expected = fastlora.unload(fastlora.load(read(base), adapter), merge=True)
    state, found, before = expected.state_dict(), weights(out), weights(base)
    assert found.keys() == before.keys()
    assert any(not torch.equal(found[name], before[name]) for name in found)
    for name, tensor in found.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, state[name]), name
    loaded, batch = read(out), make_batch()
    assert torch.equal(loaded.eval()(**batch).logits, expected.eval()(**batch).logits)
    assert contents(out).keys() == contents(base).keys() - {"optimizer.bin"}
    for file in base.glob("*.safetensors"):
        size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (out / file.name).read_bytes()[:size] == file.read_bytes()[:size]
        with safe_open(out / file.name, "pt") as reader:
            assert reader.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_equals_merging_in_memory(name, feature, dtype, tmp_path):
    base = make_base(name, dtype, tmp_path / "base")
    assert len(list(base.glob("*.safetensors"))) > 3
    targets = LLAMA if name == "llama" else GPT2
    settings = dict(target_modules=targets, fan_in_fan_out=name == "gpt2", **FEATURES[feature])
    check_merged(base, make_adapter(base, tmp_path / "adapter", **settings), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": GPT2, "lora_bias": True, "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        ("llama", {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    ],
    ids=["lora-bias", "positions", "ends", "embedding-dora", "saved"],
)
def test_other_parts_equal_merging_in_memory(name, settings, dtype, tmp_path):
    base = make_base(name, dtype, tmp_path / "base")
    check_merged(base, make_adapter(base, tmp_path / "adapter", **settings), tmp_path / "out")


def test_one_file_and_small_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlora.changes.BLOCK", 100)
    monkeypatch.setattr("fastlora.shards.CHUNK", 1000)
    base = make_base("llama", torch.bfloat16, tmp_path / "base", shards=False)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[*LLAMA, "embed_tokens"])
    calls = []
    fastlora.merge_checkpoint(base, adapter, tmp_path / "blocks", progress=lambda *sizes: calls.append(sizes))
    check_merged(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "blocks") == contents(tmp_path / "out")
    size = (base / "model.safetensors").stat().st_size
    assert calls[-1] == (size, size)
    assert calls == sorted(calls)
    assert len(calls) > 100


def test_names_of_a_bare_model(tmp_path):
    """The files of a bare model lack the leading `transformer.`, as those of GPT-2 on the hub do."""
    base = make_base("gpt2", torch.float32, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=GPT2, fan_in_fan_out=True)
    bare = tmp_path / "bare"
    read(base).transformer.save_pretrained(bare)
    fastlora.merge_checkpoint(base, adapter, tmp_path / "whole")
    fastlora.merge_checkpoint(bare, adapter, tmp_path / "out")
    expected = {name.removeprefix("transformer."): value for name, value in weights(tmp_path / "whole").items()}
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.fixture
def folders(tmp_path):
    base = make_base("llama", torch.float32, tmp_path / "base")
    return base, make_adapter(base, tmp_path / "adapter", target_modules=LLAMA), tmp_path / "out"


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def change_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED_TENSORS = {
    "half": (lambda t: t.pop(f"{Q}.lora_B.weight"), "expected .*lora_B.weight"),
    "unknown": (lambda t: t.update({f"{Q}x.lora_A.weight": t.pop(f"{Q}.lora_A.weight")}), "q_projx|lora_A"),
    "no-such-module": (
        lambda t: t.update({f"{Q}x.lora_{p}.weight": t.pop(f"{Q}.lora_{p}.weight") for p in "AB"}),
        "q_projx.lora_A.weight: expected a tensor .* in the base, found none",
    ),
    "prefix": (lambda t: t.update({"model.x": torch.ones(1)}), "names that begin with"),
    "rank": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 48), f"{Q}.lora_B.weight": torch.ones(48, 3)}),
        r"expected shape \[4, 48\]",
    ),
    "shape": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 50)}), "of shape"),
    "nan": (lambda t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), "finite"),
    "tokens": (lambda t: t.update({"base_model.model.x.token_adapter.y": torch.ones(1)}), "trainable_token"),
    "replaced-shape": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(97, 48)}),
        r"expected shape \[96, 48\]",
    ),
    "no-place-for-a-bias": (lambda t: t.update({f"{Q}.bias": torch.ones(48)}), "no place for a trained bias"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED_TENSORS.values(), ids=REFUSED_TENSORS.keys())
def test_a_refused_adapter_writes_nothing(folders, change, message):
    base, adapter, out = folders
    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=message):
        fastlora.merge_checkpoint(base, adapter, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ],
    ids=str,
)
def test_refused_settings_write_nothing(folders, settings, message):
    base, adapter, out = folders
    change_json(adapter / "adapter_config.json", **settings)
    with pytest.raises(ValueError, match=message):
        fastlora.merge_checkpoint(base, adapter, out)
    assert not out.exists()


def test_refused_bases_write_nothing(folders):
    base, adapter, out = folders
    change_json(base / "config.json", quantization_config={"quant_method": "x"})
    with pytest.raises(ValueError, match="not quantised"):
        fastlora.merge_checkpoint(base, adapter, out)
    change_json(base / "config.json", quantization_config=None)
    shard = next(iter(sorted(base.glob("*.safetensors"))))
    whole = shard.read_bytes()
    for broken, message in [(whole[:-1], "whole safetensors"), (whole[:5], "whole"), (b"\xff" * 20, "whole")]:
        shard.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            fastlora.merge_checkpoint(base, adapter, out)
    shard.unlink()
    with pytest.raises(ValueError, match="found none"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert not out.exists()


@pytest.mark.parametrize("settings", [{"target_modules": ["wte"]},
                                      {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}],
                         ids=["embedding", "head"])  # fmt: skip
def test_tied_weights_are_refused(settings, tmp_path):
    base = make_base("gpt2", torch.float32, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", fan_in_fan_out=True, **settings)
    with pytest.raises(ValueError, match="tied"):
        fastlora.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_weight_that_is_not_finite(tmp_path):
    base = make_base("llama", torch.float16, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LLAMA)
    change_tensors(adapter, lambda tensors: [tensors[f"{Q}.lora_{part}.weight"].fill_(1e4) for part in "AB"])
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.weight: expected finite"):
        fastlora.merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_must_be_new(folders):
    base, adapter, out = folders
    fastlora.merge_checkpoint(base, adapter, out)
    before = contents(out)
    for folder in (out, base):
        with pytest.raises(ValueError, match="out: expected a new folder"):
            fastlora.merge_checkpoint(base, adapter, folder)
    assert contents(out) == before


def failing(call: int):
    """os.fsync on a disk that is full from some call on."""
    calls, real = [], os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    return fsync


def test_a_full_disk(folders, monkeypatch):
    base, adapter, out = folders
    fastlora.merge_checkpoint(base, adapter, out.with_name("expected"))
    expected = contents(out.with_name("expected"))
    for call in range(1, 30, 3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(call))
            with pytest.raises(OSError, match="No space left"):
                fastlora.merge_checkpoint(base, adapter, out)
        found = contents(out)
        assert not [name for name in found if name.endswith(".partial")]
        assert "config.json" not in found
        assert all(found[name] == expected[name] for name in found.keys() - {MANIFEST})
    fastlora.merge_checkpoint(base, adapter, out)
    assert contents(out) == expected


def test_an_interrupted_merge_of_others_is_refused(folders, monkeypatch):
    base, adapter, out = folders
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(8))
        with pytest.raises(OSError, match="No space left"):
            fastlora.merge_checkpoint(base, adapter, out)
    before = contents(out)
    assert any(name.endswith(".safetensors") for name in before)
    change_json(adapter / "adapter_config.json", lora_alpha=7)
    with pytest.raises(ValueError, match="found one of others"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert contents(out) == before


# The child waits before every sync, so that there is time to kill it at any stage.
CHILD = """
import os, sys, time
import fastlora
real = os.fsync
os.fsync = lambda descriptor: (time.sleep(0.02), real(descriptor))[1]
print("ready", flush=True)
fastlora.merge_checkpoint(*sys.argv[1:])
"""


def test_killed_at_any_moment(folders):
    base, adapter, out = folders
    fastlora.merge_checkpoint(base, adapter, out.with_name("expected"))
    expected, generator, unfinished = contents(out.with_name("expected")), random.Random(3), 0
    for _ in range(8):
        arguments = [sys.executable, "-c", CHILD, str(base), str(adapter), str(out)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
            assert child.stdout.readline() == b"ready\n"
            time.sleep(generator.uniform(0, 0.25))
            child.send_signal(signal.SIGKILL)
        found = contents(out) if out.exists() else {}
        if "config.json" in found:
            assert all(found[name] == expected[name] for name in expected)
            break
        unfinished += 1
        assert all(found[name] == expected[name] for name in found if not name.startswith("."))
    assert unfinished
    if not out.exists() or MANIFEST in contents(out) or "config.json" not in contents(out):
        fastlora.merge_checkpoint(base, adapter, out)
    assert contents(out) == expected


def test_the_command(folders):
    base, adapter, out = map(str, folders)
    result = CliRunner().invoke(app, ["merge", base, adapter, out])
    assert result.exit_code == 0, result.output
    assert result.output == f"merged into {out}\n"
    assert "config.json" in contents(Path(out))
    result = CliRunner().invoke(app, ["merge", base, adapter, out])
    assert result.exit_code == 1
    assert "error: out: expected a new folder" in result.output
    assert "Traceback" not in result.output
