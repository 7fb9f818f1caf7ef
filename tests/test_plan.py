"""`fastlora.plan` against models that are really made, and what it says of large ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner
from zoo import ZOO

import fastlora
from fastlora.cli import app
from fastlora.planning.optimizers import OPTIMIZERS, state_bytes
from fastlora.planning.sources import find_model
from fastlora.planning.steps import StepMemory, step_memory
from fastlora_kernels import cpu

TINY = dict(
    vocab_size=160, hidden_size=64, intermediate_size=112, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", TINY),
    "mixtral": ("MixtralConfig", TINY | dict(num_local_experts=4, num_experts_per_tok=2)),
    "qwen3": ("Qwen3Config", TINY | dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-moe": ("Qwen3MoeConfig", TINY | dict(head_dim=16, num_experts=8, num_experts_per_tok=2,
                                                moe_intermediate_size=48)),
}  # fmt: skip

# As published: meta-llama/Meta-Llama-3-70B, mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-32B and Qwen/Qwen3-30B-A3B.
LARGE = {
    "llama-3-70b": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=8192, intermediate_size=28672,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "mixtral-8x7b": dict(
        architectures=["MixtralForCausalLM"], model_type="mixtral", hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
        num_experts_per_tok=2, vocab_size=32000, max_position_embeddings=32768, rope_theta=1000000.0,
        rms_norm_eps=1e-5, tie_word_embeddings=False,
    ),
    "qwen3-32b": dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=5120, intermediate_size=25600,
        num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        max_position_embeddings=40960, rope_theta=1000000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    ),
    "qwen3-30b-a3b": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[], num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        vocab_size=151936, max_position_embeddings=40960, rope_theta=1000000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    ),
}  # fmt: skip
# Without adapters, as the model cards round them.
PARAMETERS = {"llama-3-70b": 70.6e9, "mixtral-8x7b": 46.7e9, "qwen3-32b": 32.8e9, "qwen3-30b-a3b": 30.5e9}


def make_config(name: str, dtype: torch.dtype = torch.float32):
    kind, settings = MODELS[name]
    return getattr(transformers, kind)(dtype=dtype, **settings)


def make_patched(config, **settings) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.config.use_cache = False
    return fastlora.patch(model, **settings).train()


def allocations(function) -> list[int]:
    """What torch's CPU allocator gave out and took back while a function ran, in bytes and in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def measure_step(model: nn.Module, batch: int, length: int) -> tuple[int, int]:
    """Bytes that a forward keeps, and the most that forward and backward have at once, as the allocator sees it."""
    ids = torch.randint(160, (batch, length))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    losses = []

    def step():
        losses.append(model(input_ids=ids, labels=ids).loss)

    step()
    losses.pop().backward()  # buffers that live on are there now
    kept = sum(allocations(step))
    losses.pop().backward()
    sizes, now, peak = allocations(lambda: (step(), losses.pop().backward())), 0, 0
    for size in sizes:
        now += size
        peak = max(peak, now)
    return kept, peak


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("quantize", [None, "int8"], ids=["dense", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_a_step_takes(name, quantize, checkpointing):
    """The peak within a tenth, as promised: scratch within an operator is not seen."""
    settings = dict(r=4, targets="all-linear", dropout=0.1, quantize=quantize)
    plan = fastlora.plan(make_config(name), batch=2, length=64, checkpointing=checkpointing, **settings)
    memory, model = plan.memory, make_patched(make_config(name), **settings)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    assert (plan.trainable, plan.parameters) == fastlora.trainable_parameters(model)
    assert memory.adapters == memory.gradients == sum(p.nbytes for p in trained)
    assert memory.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - memory.adapters
    kept, peak = measure_step(model, 2, 64)
    states = TINY["num_hidden_layers"] * torch.get_rng_state().nbytes if checkpointing else 0  # one per checkpoint
    assert memory.activations == pytest.approx(kept - states, rel=0.01)
    beside = memory.weights + memory.adapters + memory.gradients + memory.optimizer
    assert memory.peak == pytest.approx(beside + peak, rel=0.1)


def test_what_is_counted_is_most_of_a_step():
    """So that the comparison above is one of activations, and not of weights alone."""
    memory = fastlora.plan(make_config("llama"), r=4, targets="all-linear", batch=2, length=64).memory
    assert memory.activations > 0.5 * memory.peak


@pytest.mark.parametrize("name", LARGE)
def test_large_models_in_seconds(name, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LARGE[name] | {"dtype": "bfloat16"}))
    start = time.process_time()
    plan = fastlora.plan(file, r=16, targets="all-linear", quantize="int8", length=2048, checkpointing=True)
    assert time.process_time() - start < 5
    scales = sum(row.count * row.shape[0] for row in plan.rows if row.stored == "int8")
    assert plan.parameters - plan.trainable - scales == pytest.approx(PARAMETERS[name], rel=0.005)
    assert plan.memory.activations > 0
    q_proj = next(row for row in plan.rows if row.name.endswith("q_proj"))
    assert (q_proj.name, q_proj.count, q_proj.rank) == (
        "model.layers.*.self_attn.q_proj", LARGE[name]["num_hidden_layers"], 16
    )  # fmt: skip


MIXED_LAYERS = {
    "llama": {},
    "gemma2": dict(sliding_window=8),
    "qwen3-moe": dict(mlp_only_layers=[1, 4]),
    "gpt2": dict(n_layer=6),
    "t5": dict(num_layers=6, num_decoder_layers=5),
    "bert": {},
    "vit": {},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", MIXED_LAYERS)
def test_few_layers_tell_what_all_take(name, checkpointing):
    architecture = ZOO[name]
    layers = {} if name in ("gpt2", "t5") else {"num_hidden_layers": 6}
    settings = architecture.settings | layers | MIXED_LAYERS[name]
    config = getattr(transformers, architecture.config)(architectures=[architecture.model], **settings)

    def step(whole: bool) -> StepMemory:
        model = find_model(config, None).model
        return step_memory(fastlora.patch(model, 2, architecture.targets), 2, 12, checkpointing, whole)

    assert step(False) == step(True)


def test_few_layers_are_run_where_many_repeat(monkeypatch):
    lengths = []
    forward = transformers.LlamaModel.forward
    monkeypatch.setattr(
        transformers.LlamaModel, "forward",
        lambda self, *args, **kwargs: lengths.append(len(self.layers)) or forward(self, *args, **kwargs),
    )  # fmt: skip
    fastlora.plan(make_config("llama"))
    assert lengths == [2, 3]


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
        (dict(length=200), "length 200 is past the 128 tokens"),
        (dict(device="xpu"), "there are no kernels for device 'xpu'"),
        (dict(batch=10**9, device="cpu"), "GiB at its peak; the cpu here has"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_what_to_expect_is_said(settings, note):
    assert note in notes_of(**settings)


def test_experts_without_an_adapter_are_noted():
    assert "fused experts without an adapter" in notes_of("mixtral")
    adapted = fastlora.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    assert "without an adapter" not in notes_of("mixtral", config=adapted)
    assert "experts.gate_up_proj: the modules' own products, in PyTorch" in notes_of("mixtral", config=adapted)


def test_a_slow_dtype_is_noted(monkeypatch):
    monkeypatch.setattr(cpu, "product_dtype", lambda dtype: torch.float32)
    assert "load the model with dtype=torch.float32" in notes_of(dtype=torch.bfloat16, device="cpu")


def test_quantised_files_are_noted():
    config = make_config("llama")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    assert "weights are counted dense, though the files are quantised by bitsandbytes" in notes_of(config)
    assert config.quantization_config["load_in_4bit"]


def test_a_forward_that_fails_leaves_the_rest(monkeypatch):
    def forward(self, *args, **kwargs):
        raise RuntimeError("not today\nnor tomorrow")

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    plan = fastlora.plan(make_config("llama"))
    assert plan.notes == ["activations were not counted: RuntimeError: not today"]
    assert (plan.memory.activations, plan.memory.peak) == (None, None)


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
    with pytest.raises(ValueError, match="expected none with an adapter's own"):
        fastlora.plan(model, r=2)


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
        (["{model}", "--r", "0"], "0 is not in the range"),
        (["{model}", "--rank", "3"], "No such option"),
    ],
)
def test_the_user_is_told_what_to_mend(tmp_path, arguments, message):
    make_config("llama").save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", *(a.format(model=tmp_path) for a in arguments)])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "Traceback" not in result.output
