"""What a user can get wrong: one clear error that names it, and nothing changed."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest
import torch
from models import make_model
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora


def fingerprint(model):
    """Everything of a model that a failed call must leave alone."""
    modules = {name: type(module) for name, module in model.named_modules()}
    tensors = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    return modules, tensors, set(model.__dict__)


def assert_unchanged(model, before):
    modules, tensors, attributes = fingerprint(model)
    assert (modules, attributes) == (before[0], before[2])
    assert tensors.keys() == before[1].keys()
    for name, (tensor, trains) in tensors.items():
        assert trains == before[1][name][1], name
        assert torch.equal(tensor.nan_to_num(), before[1][name][0].nan_to_num()), name


def refused(model, message, call, error=ValueError):
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        call()
    assert_unchanged(model, before)


@pytest.fixture
def llama():
    return make_model("llama")


PATCHES = {
    "no such target": (dict(targets=["q_prj"]), "found none for .*nearest: q_proj"),
    "no match at all": (dict(targets=["xyzzy"]), "nearest: down_proj, gate_proj, k_proj"),
    "regex without match": (dict(targets=r".*\.query"), "found none"),
    "all excluded": (
        dict(config=fastlora.LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"])),
        r"found that exclude_modules \['q_proj'\] or layers_to_transform None leaves out all",
    ),
    "rank 0": (dict(r=0), "r: expected a whole number of at least 1, found 0"),
    "negative rank": (dict(r=-3), "found -3"),
    "rank not whole": (dict(r=2.5), "found 2.5"),
    "dropout 1": (dict(dropout=1.0), "lora_dropout: expected 0 <= dropout < 1, found 1.0"),
    "dropout negative": (dict(dropout=-0.1), "found -0.1"),
    "output head": (dict(targets=["q_proj", "lm_head"]), "lm_head.*would leave the adapter untrained"),
    "quantize": (dict(quantize="int3"), "quantize: expected one of .*found 'int3'"),
    "adapter name": (dict(adapter="a.b"), "name without dots"),
    "config and r": (dict(r=4, config=fastlora.LoraConfig()), "either a config or"),
}


@pytest.mark.parametrize(("arguments", "message"), PATCHES.values(), ids=PATCHES.keys())
def test_patch_refuses(llama, arguments, message):
    refused(llama, message, lambda: fastlora.patch(llama, **arguments))


def test_patch_refuses_target_of_another_kind(llama):
    call = lambda: fastlora.patch(llama, targets=["embed_tokens"])  # noqa: E731
    refused(
        llama,
        "expected nn.Linear, Conv1D or nn.MultiheadAttention, found Embedding at 'model.embed_tokens'",
        call,
        TypeError,
    )


def test_patch_refuses_config_of_another_kind(llama):
    refused(llama, "config: expected a LoraConfig, found int", lambda: fastlora.patch(llama, config=3), TypeError)


def test_patch_refuses_the_same_adapter_twice(llama):
    fastlora.patch(llama, targets=["q_proj"])
    refused(llama, "adapter: expected a new name, found 'default'", lambda: fastlora.patch(llama, targets=["k_proj"]))
    fastlora.patch(llama, targets=["k_proj"], adapter="second")


def test_patch_refuses_a_merged_model(llama):
    fastlora.merge(fastlora.patch(llama, targets=["q_proj"]))
    refused(llama, "expected an unmerged model", lambda: fastlora.patch(llama, targets=["q_proj"], adapter="second"))


def test_patch_without_default_targets():
    model = nn.Sequential(nn.Linear(4, 4))
    refused(model, "no default for model_type None", lambda: fastlora.patch(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantize_refuses_what_is_not_finite(llama, value):
    llama.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    call = lambda: fastlora.patch(llama, targets=["q_proj", "down_proj"], quantize="int8")  # noqa: E731
    refused(llama, r"inf or nan in model\.layers\.1\.mlp\.down_proj\.weight", call)


def test_quantize_refuses_a_tied_weight():
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    call = lambda: fastlora.patch(model, targets=["lm_head"], quantize="int8", allow_output_head=True)  # noqa: E731
    refused(model, "weight of its own at 'lm_head', found it shared with 'model.embed_tokens'", call)


@pytest.mark.parametrize(
    "setting", [dict(use_qalora=True), dict(use_bdlora={"a": 1}), dict(arrow_config={"a": 1})], ids=str
)
def test_config_refuses_unsupported_settings(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: not supported"):
        fastlora.LoraConfig(**setting)


@pytest.mark.parametrize("call", [fastlora.merge, fastlora.unmerge, fastlora.unload, lambda m: fastlora.save(m, "x")])
def test_unpatched_model_is_refused(llama, call):
    refused(llama, "expected one that was patched, found LlamaForCausalLM", lambda: call(llama))


def test_merge_refuses_what_is_not_finite(llama):
    fastlora.patch(llama, targets=["q_proj", "v_proj"])
    llama.model.layers[1].self_attn.v_proj.lora_B["default"].data.fill_(float("inf"))
    refused(llama, r"layers\.1\.self_attn\.v_proj: .*expected a finite merged weight", lambda: fastlora.merge(llama))


def test_wrong_input_dtype_is_refused(llama):
    fastlora.patch(llama.bfloat16(), targets=["q_proj"])
    with pytest.raises(
        TypeError, match=r"input: expected torch.bfloat16, the dtype of the weight, found torch.float32"
    ):
        llama.model.layers[0].self_attn.q_proj(torch.randn(2, 48))


# Adapter folders


@pytest.fixture
def folder(tmp_path):
    fastlora.save(fastlora.patch(make_model("llama"), r=4, targets=["q_proj", "down_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def make_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def without_first(tensors):
    return dict(list(tensors.items())[1:])


def with_nan(tensors):
    return {key: torch.full_like(tensor, float("nan")) for key, tensor in tensors.items()}


FOLDERS = {
    "no folder": (lambda f: f.rename(f.parent / "elsewhere"), "expected a folder with adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "with adapter_model.safetensors, found none"),
    "pickle": (make_pickle, "found adapter_model.bin .* a pickle"),
    "truncated": (truncate, "expected a whole safetensors file"),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "expected a whole safetensors file"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "expected JSON"),
    "JSON list": (lambda f: (f / "adapter_config.json").write_text("[]"), "expected a JSON object, found list"),
    "another rank": (lambda f: change_config(f, r=5), r"lora_A.weight of shape \[5, \d+\] .*, found \[4, \d+\]"),
    "another method": (lambda f: change_config(f, peft_type="IA3"), "peft_type: expected 'LORA', found 'IA3'"),
    "unsupported": (lambda f: change_config(f, use_qalora=True), "use_qalora: not supported"),
    "unknown setting": (lambda f: change_config(f, use_magic=True), "use_magic: a setting that fastlora does not know"),
    "missing tensor": (lambda f: change_tensors(f, without_first), "expected lora_[AB].weight of shape .*, found none"),
    "no tensors": (lambda f: change_tensors(f, lambda t: {}), "found an empty file"),
    "foreign key": (lambda f: change_tensors(f, lambda t: t | {"x": torch.ones(1)}), "found 'x'"),
    "nan": (lambda f: change_tensors(f, with_nan), "expected finite weights"),
}


@pytest.mark.parametrize(("damage", "message"), FOLDERS.values(), ids=FOLDERS.keys())
@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
def test_load_refuses(folder, damage, message, patched):
    model = make_model("llama")
    if patched:
        fastlora.patch(model, targets=["v_proj"], adapter="other")
    damage(folder)
    refused(model, message, lambda: fastlora.load(model, folder))


def test_load_refuses_an_adapter_of_another_model(folder):
    model = make_model("gpt2")
    refused(
        model,
        "expected an adapter for this model, found weights for 'model.layers",
        lambda: fastlora.load(model, folder),
    )


def test_load_refuses_another_size(folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=80, num_hidden_layers=2, vocab_size=96,
                                         num_attention_heads=4))  # fmt: skip
    refused(model, r"expected lora_B.weight of shape \[32, 4\]", lambda: fastlora.load(model, folder))


def test_load_warns_of_another_base(folder, caplog):
    change_config(folder, base_model_name_or_path="somebody/llama-one")
    model = make_model("llama")
    model.config._name_or_path = "somebody/llama-two"
    fastlora.load(model, folder)
    assert re.search("made for 'somebody/llama-one', and is put on 'somebody/llama-two'", caplog.text)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_save_into_an_unwritable_place(folder):
    model = fastlora.load(make_model("llama"), folder)
    blocked = folder / "adapter_config.json" / "below-a-file"
    before = contents(folder)
    with pytest.raises(OSError, match=r"adapter_config\.json"):
        fastlora.save(model, blocked)
    assert contents(folder) == before


SAVE_WITHOUT_ROOM = """
import resource, signal, sys
import fastlora
from models import make_model
model = fastlora.patch(make_model("llama"), r=16, targets="all-linear")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    fastlora.save(model, sys.argv[1])
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(
    not hasattr(resource, "RLIMIT_FSIZE"), reason="the limit on a file's size stands in for a full disk"
)
def test_save_without_room_keeps_the_old_files(folder):
    before = contents(folder)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    result = subprocess.run([sys.executable, "-c", SAVE_WITHOUT_ROOM, str(folder)], capture_output=True, text=True,
                            env=environment)  # fmt: skip
    assert result.stdout.startswith("refused:"), result.stderr[-2000:]
    assert contents(folder) == before
