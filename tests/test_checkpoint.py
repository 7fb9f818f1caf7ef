"""Merging on disk: the same bits as merging in memory, and a folder that is whole or not there."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import change_json, change_tensors, contents, make_adapter, make_base, read, weights
from models import make_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fastlora
from fastlora.checkpoints.folder import MANIFEST
from fastlora.cli import app

LLAMA, GPT2 = ["q_proj", "v_proj", "down_proj"], ["c_attn", "c_proj", "c_fc"]
FEATURES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.*q_proj|h.1.*c_attn": 2}, "alpha_pattern": {"down_proj|c_fc": 3}},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
}


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
    assert len(list(base.glob("*.safetensors"))) > 2
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
    monkeypatch.setattr("fastlora.checkpoints.change.BLOCK", 100)
    monkeypatch.setattr("fastlora.checkpoints.pieces.CHUNK", 1000)
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


@pytest.mark.parametrize("lead", ["", "model.transformer."])
def test_adapters_of_other_leading_parts(lead, tmp_path):
    """An adapter made for the bare model fits the files of the whole one; other names are refused."""
    base = make_base("gpt2", torch.float32, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=GPT2, fan_in_fan_out=True)
    fastlora.merge_checkpoint(base, adapter, tmp_path / "expected")
    rename(adapter, "base_model.model.transformer.", f"base_model.model.{lead}")
    fastlora.merge_checkpoint(base, adapter, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    rename(adapter, f"base_model.model.{lead}", "base_model.model.text.")
    with pytest.raises(ValueError, match=r"base_model\.model\.text\.h.*found none"):
        fastlora.merge_checkpoint(base, adapter, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def rename(adapter: Path, before: str, after: str) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors = {after + name.removeprefix(before): tensor for name, tensor in tensors.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_an_ambiguous_name_is_refused(folders, tmp_path):
    _, adapter, out = folders
    base = tmp_path / "two"
    base.mkdir()
    names = ["model.q.weight", "transformer.q.weight"]
    save_file({name: torch.ones(48, 48) for name in names}, base / "model.safetensors")
    parts = {f"base_model.model.q.lora_{part}.weight" for part in "AB"}
    shapes = {"A": (4, 48), "B": (48, 4)}
    save_file({name: torch.ones(shapes[name[-8]]) for name in parts}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="ambiguous"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert not out.exists()


def test_no_model_and_no_library_of_models_is_loaded(folders):
    code = (
        "import sys, fastlora, torch; torch.nn.Module.__init__ = None; fastlora.merge_checkpoint(*sys.argv[1:]); "
        "print([name for name in ('transformers', 'peft', 'accelerate') if name in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, *map(str, folders)]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture
def folders(tmp_path):
    base = make_base("llama", torch.float32, tmp_path / "base")
    return base, make_adapter(base, tmp_path / "adapter", target_modules=LLAMA), tmp_path / "out"


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED_TENSORS = {
    "half": (lambda t: t.pop(f"{Q}.lora_B.weight"), "expected .*lora_B.weight"),
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
    "tokens": (
        lambda t: t.update({f"{Q}.token_adapter.trainable_tokens_delta": torch.ones(1, 48)}),
        r"trainable_tokens_delta: expected shape \[0, 48\]",
    ),
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


def test_an_embedding_of_a_model_without_a_head(tmp_path):
    base = make_base("gpt2", torch.float32, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["wte"])
    change_json(base / "config.json", tie_word_embeddings=None, architectures=["GPT2Model"])
    fastlora.merge_checkpoint(base, adapter, tmp_path / "out")
    before, after = weights(base), weights(tmp_path / "out")
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["transformer.wte.weight"]


def test_a_device_that_is_not_there(folders):
    base, adapter, out = folders
    with pytest.raises(ValueError, match="device: expected one of this machine, found 'nowhere'"):
        fastlora.merge_checkpoint(base, adapter, out, device="nowhere")
    assert not out.exists()


def test_a_merged_weight_that_is_not_finite(tmp_path):
    base = make_base("llama", torch.float16, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=LLAMA)
    change_tensors(adapter, lambda tensors: [tensors[f"{Q}.lora_{part}.weight"].fill_(1e4) for part in "AB"])
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight: expected finite"):
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


def failing(call: int, real, calls: list):
    """A function that finds the disk full from some call on."""

    def function(*arguments):
        calls.append(arguments)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    return function


def check_unfinished(out: Path, expected: dict[str, bytes], partials: bool = False) -> bool:
    """What is there is whole, config.json not without all the rest. Returns whether anything is missing."""
    found = contents(out) if out.exists() else {}
    whole = {name: content for name, content in found.items() if not name.startswith(".")}
    assert partials or found.keys() <= whole.keys() | {MANIFEST}
    assert all(content == expected[name] for name, content in whole.items())
    assert "config.json" not in whole or whole == expected
    return MANIFEST in found or not whole


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "os.pwrite"])
def test_a_full_disk(folders, monkeypatch, where):
    base, adapter, out = folders
    real = {"os.fsync": os.fsync, "os.replace": os.replace, "os.pwrite": os.pwrite}[where]
    calls: list = []
    with monkeypatch.context() as patch:
        patch.setattr(where, failing(1000, real, calls))
        fastlora.merge_checkpoint(base, adapter, out.with_name("expected"))
    expected = contents(out.with_name("expected"))
    assert len(calls) > 5
    for call in range(1, len(calls) + 1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(where, failing(call, real, []))
            with pytest.raises(OSError, match="No space left"):
                fastlora.merge_checkpoint(base, adapter, out)
        if check_unfinished(out, expected):
            fastlora.merge_checkpoint(base, adapter, out)
        assert contents(out) == expected
        shutil.rmtree(out)


def test_an_interrupted_merge_of_others_is_refused(folders, monkeypatch):
    base, adapter, out = folders
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(8, os.fsync, []))
        with pytest.raises(OSError, match="No space left"):
            fastlora.merge_checkpoint(base, adapter, out)
    before = contents(out)
    assert any(name.endswith(".safetensors") for name in before)
    change_json(adapter / "adapter_config.json", lora_alpha=7)
    with pytest.raises(ValueError, match="found one of others"):
        fastlora.merge_checkpoint(base, adapter, out)
    assert contents(out) == before


# Merges in children that end as if killed from outside, each after another number of writes, syncs and renames.
KILLED = """
import os, random, signal, sys
import fastlora
calls, last = 0, 0
def counted(function):
    def call(*arguments):
        global calls
        result = function(*arguments)
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
os.pwrite = counted(os.pwrite)
base, adapter, out = sys.argv[1:]
fastlora.merge_checkpoint(base, adapter, out)
for attempt, last in enumerate(sorted(random.Random(3).sample(range(1, calls + 1), 8))):
    calls, child = 0, os.fork()
    if not child:
        fastlora.merge_checkpoint(base, adapter, f"{out}{attempt}")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_killed_at_any_moment(folders):
    base, adapter, out = folders
    subprocess.run([sys.executable, "-c", KILLED, str(base), str(adapter), str(out)], check=True)
    expected, stages = contents(out), set()
    for attempt in range(8):
        killed = out.with_name(f"{out.name}{attempt}")
        stages.add(len(contents(killed)))
        if check_unfinished(killed, expected, partials=True):
            fastlora.merge_checkpoint(base, adapter, killed)
        assert contents(killed) == expected
    assert len(stages) > 3


def test_the_command(folders):
    base, adapter, out = map(str, folders)
    result = CliRunner().invoke(app, ["merge", base, adapter, out])
    assert result.exit_code == 0, result.output
    assert result.output == f"merged into {out}\n"
    assert "config.json" in contents(Path(out))
    result = CliRunner().invoke(app, ["merge", base, adapter, out])
    assert result.exit_code == 2
    assert "error: out: expected a new folder" in result.output
    assert "Traceback" not in result.output


def test_the_command_shows_a_bar_on_a_terminal(folders, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = CliRunner().invoke(app, ["merge", *map(str, folders)])
    assert result.exit_code == 0, result.output
    assert "bytes" in result.output or "kB" in result.output
