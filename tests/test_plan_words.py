"""What `fastlora.plan` says besides memory, where it takes a model from, what it refuses, and its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from tiny import make_config, make_patched
from torch import nn
from typer.testing import CliRunner

import fastlora
from fastlora.cli import app
from fastlora.planning.optimizers import OPTIMIZERS, state_bytes
from fastlora_kernels import cpu
from fastlora_kernels.gpu.plan import choose_plan

OPTIMIZER_CLASSES = {
    "adamw": lambda p: torch.optim.AdamW(p), "adafactor": lambda p: torch.optim.Adafactor(p),
    "sgd": lambda p: torch.optim.SGD(p),
    "adamw_8bit": lambda p: pytest.importorskip("bitsandbytes").optim.AdamW8bit(p),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states(name):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((16, 300), (300, 16), (8, 4), (5,))]
    optimizer = OPTIMIZER_CLASSES[name](parameters)
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    tensors = {
        (key, id(p)): value for p in parameters for key, value in optimizer.state[p].items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")  # one table for all tensors
    }  # fmt: skip
    assert state_bytes(name, parameters) == sum(tensor.nbytes for tensor in tensors.values())


def notes_of(model="llama", **settings) -> str:
    return "\n".join(fastlora.plan(make_config(model) if isinstance(model, str) else model, **settings).notes)


def test_nothing_to_note():
    assert notes_of() == ""


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (dict(targets=["lm_head"]), "lm_head: an adapter on the output head does not train under trainers that"),
        (dict(r=300, device="cuda"), "eager PyTorch: the GPU kernels hold ranks up to 256"),
        (dict(r=300, device="cpu"), "rank 300 runs in eager PyTorch on a GPU, whose kernels hold 256"),
        (dict(r=80), "rank 80 is more than a weight of shape [64, 64] has"),
        (dict(config=fastlora.LoraConfig(use_dora=True, lora_dropout=0.1)), "adapters by PyTorch: DoRA with dropout"),
        (dict(config=fastlora.LoraConfig(init_lora_weights="pissa")), "keeps the targets' original weights besides"),
        (dict(targets=["embed_tokens"]), "there are no kernels for adapters on Embedding"),
        (dict(length=600), "length 600 is past the 512 tokens"),
        (dict(device="xpu"), "there are no kernels for device 'xpu'"),
        (dict(batch=10**9, device="cpu"), "GiB at its peak, and this machine's cpu has"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_what_to_expect_is_said(settings, note):
    assert note in notes_of(**settings)


def test_the_kernels_of_a_gpu_that_is_not_there():
    """The plan's words are those of the choice that the launcher makes."""
    plan = fastlora.plan(
        make_config("llama", torch.bfloat16), r=16, targets=["q_proj"], quantize="int8", dropout=0.1, batch=4,
        device="cuda", arch=90,
    )  # fmt: skip
    (row,) = [row for row in plan.rows if row.rank]
    chosen = [choose_plan(90, torch.bfloat16, 2048, 64, 64, 16, True, 0.1, op) for op in ("forward", "backward")]
    words = f"{chosen[0].kind} forward, {chosen[1].kind} backward ({chosen[0].why})"
    assert row.computed_by.startswith("Triton kernels")
    assert row.computed_by.endswith(f": {words}")
    assert plan.notes == []


def test_experts_without_an_adapter_are_noted():
    assert "fused experts without an adapter" in notes_of("mixtral")
    adapted = fastlora.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    assert "without an adapter" not in notes_of("mixtral", config=adapted)
    assert "experts.gate_up_proj: the modules' own products, in PyTorch" in notes_of("mixtral", config=adapted)


def test_a_slow_dtype_is_noted(monkeypatch):
    monkeypatch.setattr(cpu, "product_dtype", lambda dtype: torch.float32)
    assert "load the model with dtype=torch.float32" in notes_of(dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize(
    "settings",
    [{"quant_method": "bitsandbytes", "load_in_4bit": True}, transformers.BitsAndBytesConfig(load_in_4bit=True)],
    ids=["dictionary", "object"],
)
def test_quantised_files_are_noted(settings):
    config = make_config("llama")
    config.quantization_config = settings
    assert "weights are counted dense, though the files are quantised by bitsandbytes" in notes_of(config)
    assert config.quantization_config is settings


def test_a_forward_that_fails_leaves_the_rest(monkeypatch):
    def forward(self, *args, **kwargs):
        raise RuntimeError("not today\nnor tomorrow")

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    plan = fastlora.plan(make_config("llama"))
    assert plan.notes == ["activations were not counted: RuntimeError: not today"]
    assert (plan.memory.activations, plan.memory.peak) == (None, None)


def test_any_module_has_a_plan():
    plan = fastlora.plan(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), r=2, targets=["0"])
    assert [(row.name, row.shape, row.rank) for row in plan.rows] == [("0", (8, 4), 2), ("2", (2, 8), 0)]
    assert plan.notes[0].endswith("model: expected one of transformers, found Sequential")


def test_a_model_of_peft_is_planned_by_its_folder():
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_config(make_config("llama"))
    with pytest.raises(ValueError, match="expected a model without PEFT's layers"):
        fastlora.plan(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])))


def test_models_of_bitsandbytes(tmp_path):
    pytest.importorskip("bitsandbytes")
    transformers.AutoModelForCausalLM.from_config(make_config("llama")).save_pretrained(tmp_path)

    def load(**bits):
        settings = transformers.BitsAndBytesConfig(**bits)
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings)

    model = load(load_in_8bit=True)
    with pytest.raises(ValueError, match="patch it, then plan it"):
        fastlora.plan(model)
    plan = fastlora.plan(fastlora.patch(model, r=4, targets=["q_proj"]))
    assert {row.stored for row in plan.rows if row.shape[0] == 112} == {"int8"}
    assert plan.memory.activations
    plan = fastlora.plan(load(load_in_4bit=True), r=4, targets=["q_proj"])
    assert plan.memory.activations is None
    assert plan.notes[-1].startswith("activations were not counted: ValueError: model: expected no layers in 4 bits")
    assert "model.layers.*.self_attn.q_proj: codes of 4 bits by bitsandbytes, adapters by PyTorch" in plan.notes
    assert "the scales of 4-bit weights are not counted" in plan.notes


def test_every_source_gives_one_plan(tmp_path):
    config = make_config("llama")
    plan = fastlora.plan(config, r=4, targets=["q_proj"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert fastlora.plan(model, r=4, targets=["q_proj"]) == plan
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    for source in (tmp_path / "model", str(tmp_path / "model" / "config.json")):
        assert fastlora.plan(source, r=4, targets=["q_proj"]) == plan
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    fastlora.save(fastlora.patch(model, r=4, targets=["q_proj"]), tmp_path / "adapter")
    assert fastlora.plan(tmp_path / "adapter") == plan
    assert fastlora.plan(model) == plan


@pytest.mark.parametrize(
    ("source", "settings", "error", "message"),
    [
        ("nobody/nothing", {}, ValueError, "downloads nothing"),
        ("empty", {}, ValueError, "expected config.json or adapter_config.json in the folder"),
        ("broken.json", {}, ValueError, "broken.json: expected JSON"),
        ("list.json", {}, ValueError, "found no model_type"),
        ("orphan", {}, ValueError, "base_model_name_or_path"),
        (7, {}, TypeError, "model: expected a model, a config"),
        ("llama", dict(length=0), ValueError, "length: expected a whole number of at least 1, found 0"),
        ("llama", dict(optimizer="adam"), ValueError, "optimizer: expected one of adamw"),
        ("llama", dict(targets=["q_prj"]), ValueError, "nearest: q_proj"),
        ("llama", dict(quantize="int5"), ValueError, "quantize: expected one of"),
        ("llama", dict(device="nowhere"), ValueError, "device: expected one that torch knows, found 'nowhere'"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, source, settings, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "orphan").mkdir()
    (tmp_path / "orphan" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(error, match=message):
        fastlora.plan(make_config("llama") if source == "llama" else source, **settings)


def test_an_adapter_has_its_own_settings(tmp_path):
    model = make_patched(make_config("llama"), r=4)
    for settings in (dict(r=2), dict(quantize="int8")):
        with pytest.raises(ValueError, match="expected none where an adapter is"):
            fastlora.plan(model, **settings)


def test_a_plan_draws_no_random_numbers():
    state = torch.get_rng_state()
    fastlora.plan(make_config("llama"), dropout=0.1, checkpointing=True)
    assert torch.equal(torch.get_rng_state(), state)


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fastlora.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_the_command_in_a_pipe(tmp_path):
    make_config("llama").save_pretrained(tmp_path)
    result = run_command(str(tmp_path), "--r", "4", "--targets", "q_proj,v_proj", "--length", "32")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    (row,) = [line for line in lines if line.startswith("model.layers.*.self_attn.q_proj")]
    assert row.split()[1:7] == ["6", "64", "x", "64", "float32", "4"]
    assert any(line.startswith("trainable params: ") for line in lines)
    assert any(line.startswith("activations") and line.endswith("MiB") for line in lines)


def test_json_is_the_plan(tmp_path):
    config = make_config("llama")
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--targets", "all-linear", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found == json.loads(json.dumps(fastlora.plan(config, targets="all-linear").to_dict()))
    assert sorted(found["memory"]) == ["activations", "adapters", "gradients", "optimizer", "peak", "weights"]
    assert sum(row["parameters"] for row in found["rows"]) == found["parameters"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "found 'no-such-model'"),
        (["{model}", "--targets", "q_prj"], "nearest: q_proj"),
        (["{model}", "--quantize", "int3"], "quantize: expected one of"),
        (["{model}", "--r", "0"], "r: expected a whole number of at least 1, found 0"),
        (["{model}", "--rank", "3"], "No such option"),
    ],
)
def test_the_user_is_told_what_to_mend(tmp_path, arguments, message):
    make_config("llama").save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", *(a.format(model=tmp_path) for a in arguments)])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_colours_are_for_terminals_that_want_them(tmp_path):
    make_config("llama").save_pretrained(tmp_path)
    terminal = {"FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": None}
    for unwanted, coloured in ((None, True), ("1", False)):
        environment = terminal | {"NO_COLOR": unwanted}
        result = CliRunner().invoke(app, ["plan", str(tmp_path), "--targets", "lm_head"], env=environment)
        assert ("\x1b[33m" in result.output) is coloured


def test_a_reader_that_goes_away(tmp_path):
    make_config("llama").save_pretrained(tmp_path)
    command = f'"{sys.executable}" -m fastlora.cli plan "{tmp_path}" | head -n 1'
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("LlamaForCausalLM in float32")
    assert "Traceback" not in result.stderr
