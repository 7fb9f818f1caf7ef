"""Against the installed PEFT: the same draws, the same numbers, the same files, the same choice of modules."""

import contextlib
import copy
import json
import math

import peft
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora import ops
from fastlora.models.architectures import DEFAULT_TARGETS

# What PEFT says of settings that are meant here, and of what it reads from transformers.
pytestmark = pytest.mark.filterwarnings("ignore:(fan_in_fan_out|.*alpha_pattern keys|.*checkpointing. is deprecated)")

R, ALPHA = 4, 8
# The largest error of one small model is a matter of luck, so the errors under several adapters are pooled.
ADAPTERS = 3

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Settings that select modules or set their rank and scaling, by model.
SELECTIONS = {
    **{f"default-{name}": (name, {}) for name in MODELS},
    **{f"all-linear-{name}": (name, dict(target_modules="all-linear")) for name in MODELS},
    "rslora": ("llama", dict(target_modules=["q_proj"], use_rslora=True)),
    "suffixes": ("llama", dict(target_modules=["mlp.up_proj", "0.self_attn.o_proj", "proj", "lm"])),
    "regex": ("llama", dict(target_modules=r".*\.1\.self_attn\.(q|k)_proj")),
    "exclude-names": ("llama", dict(target_modules=["q_proj", "v_proj"], exclude_modules=["0.self_attn.q_proj"])),
    "exclude-regex": ("llama", dict(target_modules="all-linear", exclude_modules=r".*layers\.1\..*")),
    "layer-zero": ("llama", dict(target_modules=["q_proj"], layers_to_transform=0)),
    "layers-patterns": ("t5", dict(target_modules=["q"], layers_to_transform=[1], layers_pattern=["block", "layer"])),
    "whole-name-beats-layers": (
        "llama", dict(target_modules=["q_proj", "model.layers.1.mlp.up_proj"], layers_to_transform=[0])
    ),
    "rank-pattern": (
        "llama", dict(
            target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True,
            rank_pattern={"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3, "^model.layers.0.mlp.down_proj": 5},
        )
    ),
    "alpha-pattern": (
        "bert", dict(target_modules=["query", "dense"], alpha_pattern={"query": 7, r".*\.0\..*": 5, "ense": 100})
    ),
}  # fmt: skip


REFUSED = {
    "regex-with-layers": dict(target_modules=r".*q_proj", layers_to_transform=[0]),
    "pattern-without-layers": dict(target_modules=["q_proj"], layers_pattern="layers"),
}


def wrap(model, **settings):
    """`model` as a PeftModel."""
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


def parameters(model, adapter="default"):
    """The adapter's parameters by the names that PEFT's files give them."""
    prefix = "" if isinstance(model, peft.PeftModel) else "base_model.model."
    suffix = ".weight" if isinstance(model, peft.PeftModel) else ""
    named = ((prefix + n, p) for n, p in model.named_parameters() if n.endswith(f".{adapter}{suffix}"))
    return {f"{name.removesuffix('.weight').removesuffix('.' + adapter)}.weight": p for name, p in named}


def fill(model, seed, adapter="default"):
    """Random values for A and B, the same for every model of one shape."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(parameters(model, adapter).items()):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[1]))
    return model


def smooth(model):
    """ReLU, at whose kink a last bit decides over a whole gradient, replaced by GELU."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.GELU())
    return model


def build(kind, name, dtype, seed):
    """One model with one adapter: ours, PEFT's, or PEFT's in float64 for the exact values."""
    model, targets = smooth(make_model(name, dtype)), MODELS[name][1]
    if kind in ("fastlora", "reference"):
        return fill(fastlora.patch(model, r=R, alpha=ALPHA, targets=targets), seed)
    return fill(wrap(model.double() if kind == "exact" else model, r=R, lora_alpha=ALPHA, target_modules=targets), seed)


def assert_same_logits(ours, theirs):
    batch = make_batch()
    exact = copy.deepcopy(theirs).double()
    assert_as_accurate_as_eager(*(model.eval()(**batch).logits for model in (ours, theirs, exact)), "logits")


def token_losses(model, batch):
    logits = model(**batch).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits, F.cross_entropy(wide.flatten(0, 1), batch["labels"].flatten(), reduction="none")


def train(model, batch, steps=5):
    """Logits and adapter gradients, then logits and losses per token after some steps of AdamW."""
    weights = parameters(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3)
    results = {}
    for _ in range(steps):
        optimizer.zero_grad()
        logits, losses = token_losses(model, batch)
        losses.mean().backward()
        results = results or {"logits": logits.detach(), "gradients": {n: p.grad.clone() for n, p in weights.items()}}
        optimizer.step()
    with torch.no_grad():
        results["trained logits"], results["trained losses"] = token_losses(model, batch)
    return results


def pooled(kind, name, dtype):
    """The results of `train` under each of several adapters, by what they are."""
    room = ops.using("reference") if kind == "reference" else contextlib.nullcontext()
    batch = make_batch(tokens=16, batch=8)
    with room:
        runs = [train(build(kind, name, dtype, seed).train(), batch) for seed in range(ADAPTERS)]
    return {key: [run[key] for run in runs] for key in runs[0]}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def in_units_of(scales, gradients):
    """Each gradient in units of its largest exact element, so that all of them count."""
    return [
        run[name] / scale.abs().max().to(run[name].dtype)
        for run, exact in zip(gradients, scales, strict=True)
        for name, scale in exact.items()
    ]


@BOTH_DTYPES
@pytest.mark.parametrize("init", [True, "gaussian", False])
@pytest.mark.parametrize("name", MODELS)
def test_one_seed_draws_the_adapter_of_peft(name, init, dtype):
    settings = dict(r=R, target_modules=MODELS[name][1], init_lora_weights=init)
    patched, wrapped = make_model(name, dtype), make_model(name, dtype)
    torch.manual_seed(5)
    ours = parameters(fastlora.patch(patched, config=fastlora.LoraConfig(**settings)))
    torch.manual_seed(5)
    theirs = parameters(wrap(wrapped, **settings))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype
        assert torch.equal(ours[key], value), f"{key}: {(ours[key] != value).float().mean():.0%} of the values differ"
        assert init is False or ".lora_A." in key or not ours[key].any()


@BOTH_DTYPES
@pytest.mark.parametrize("name", MODELS)
def test_trains_as_accurately_as_eager(name, dtype):
    # In 16 bits PEFT computes its branch in float32, which is not what eager PyTorch in that dtype does.
    eager = pooled("peft" if dtype == torch.float32 else "reference", name, dtype)
    ours, exact = pooled("fastlora", name, dtype), pooled("exact", name, dtype)
    for key in ("logits", "trained logits"):
        assert_as_accurate_as_eager(flat(ours[key]), flat(eager[key]), flat(exact[key]), key)
    gradients = [flat(in_units_of(exact["gradients"], run["gradients"])) for run in (ours, eager, exact)]
    assert_as_accurate_as_eager(*gradients, "gradients")
    # Of one mean eager may have the exact value by luck, so what it gets wrong per token is the measure.
    losses = [flat(run["trained losses"]).double() for run in (ours, eager, exact)]
    assert (losses[0].mean() - losses[2].mean()).abs() <= 2 * (losses[1] - losses[2]).square().mean().sqrt()


@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_what_fastlora_saved(name, adapter, tmp_path):
    config = fastlora.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=MODELS[name][1])
    model = fill(fastlora.patch(make_model(name), config=config, adapter=adapter), 3, adapter)
    fastlora.save(model, tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    loaded = peft.PeftModel.from_pretrained(make_model(name), folder, adapter_name=adapter)
    result = loaded.load_adapter(folder, "again")
    assert not result.missing_keys
    assert not result.unexpected_keys
    file = load_file(folder / "adapter_model.safetensors")
    for found in (parameters(loaded, adapter), parameters(loaded, "again"), parameters(model, adapter)):
        assert found.keys() == file.keys()
        assert all(torch.equal(found[key], file[key]) for key in file)
    assert_same_logits(model, loaded)


@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize("name", MODELS)
def test_fastlora_loads_what_peft_saved(name, adapter, tmp_path):
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=MODELS[name][1], use_rslora=True)
    wrapped = fill(peft.get_peft_model(make_model(name), config, adapter_name=adapter), 4, adapter)
    wrapped.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    model = fastlora.load(make_model(name), folder, adapter)
    ours, theirs = parameters(model, adapter), parameters(wrapped, adapter)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert_same_logits(model, wrapped)


def chosen(model):
    """Rank and scaling of every adapted module by name."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    adapters = {name: (next(layer.lora_A.parameters()), layer.scaling["default"]) for name, layer in layers.items()}
    return {name: (a.shape[0], scaling) for name, (a, scaling) in adapters.items()}


@pytest.mark.parametrize("config_of", [fastlora.LoraConfig, peft.LoraConfig], ids=["own-config", "peft-config"])
@pytest.mark.parametrize(("name", "settings"), SELECTIONS.values(), ids=SELECTIONS.keys())
def test_selects_the_modules_of_peft(name, settings, config_of):
    settings = dict(r=R, lora_alpha=6) | settings
    theirs = chosen(wrap(make_model(name), **settings).base_model.model)
    ours = chosen(fastlora.patch(make_model(name), config=config_of(**settings)))
    assert theirs
    assert ours == theirs


@pytest.mark.parametrize("settings", REFUSED.values(), ids=REFUSED.keys())
def test_refuses_what_peft_refuses(settings):
    """A setting that would have no effect is an error, not silence."""
    with pytest.raises(ValueError, match="layers_to_transform"):
        peft.LoraConfig(**settings)
    with pytest.raises(ValueError, match="layers_to_transform"):
        fastlora.LoraConfig(**settings)


def test_default_targets_are_those_of_peft():
    def as_sets(table):
        return {name: targets if isinstance(targets, str) else set(targets) for name, targets in table.items()}

    assert as_sets(DEFAULT_TARGETS) == as_sets(PEFT_TARGETS)


def test_defaults_are_those_of_peft():
    ours, theirs = fastlora.LoraConfig().to_dict(), peft.LoraConfig().to_dict()
    theirs.pop("runtime_config", None)  # PEFT keeps it out of its files
    assert ours | {"peft_version": peft.__version__} == theirs


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("llama", None), ("gpt2", "CAUSAL_LM")])
def test_files_are_written_as_peft_writes_them(name, task, tmp_path):
    settings = dict(r=R, lora_alpha=ALPHA, target_modules=MODELS[name][1], task_type=task)
    fastlora.save(fastlora.patch(make_model(name), config=fastlora.LoraConfig(**settings)), tmp_path / "ours")
    wrap(make_model(name), **settings).save_pretrained(tmp_path / "theirs")
    texts = [(tmp_path / writer / "adapter_config.json").read_text() for writer in ("ours", "theirs")]
    ours, theirs = (json.loads(text) for text in texts)
    assert texts[0] == json.dumps(ours, indent=2, sort_keys=True)
    for values in (ours, theirs):
        values["target_modules"] = sorted(values["target_modules"])  # PEFT writes a set, in any order
        values.pop("peft_version")
    assert ours == theirs
    assert metadata(tmp_path / "ours") == metadata(tmp_path / "theirs") == {"format": "pt"}


def metadata(folder):
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as reader:
        return reader.metadata()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_counts_parameters_as_peft_does(name, capsys):
    targets = MODELS[name][1]
    fastlora.print_trainable_parameters(fastlora.patch(make_model(name), r=R, targets=targets))
    ours = capsys.readouterr().out
    wrapped = wrap(make_model(name), r=R, target_modules=targets)
    capsys.readouterr()
    wrapped.print_trainable_parameters()
    assert ours == capsys.readouterr().out
