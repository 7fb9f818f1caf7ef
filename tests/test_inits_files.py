"""Adapters that changed the frozen weight: their files, both ways with PEFT, and the original weight back."""

import copy
import json
import math
import sys

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import make_batch, make_model
from peft_inits import METHODS, MOVED, PEFT_HAS_NO_CONV1D, SEED, by_fastlora, by_peft, disturb, loftq_allowed, starts

import fastlora
from fastlora import ops
from fastlora.adapters.registry import lora_layers

pytestmark = pytest.mark.filterwarnings(
    "ignore:(fan_in_fan_out|.*corda.*|.*eva.*|Using Rank-Stabilized|.*changes the base weights|"
    ".*[Ff]ull backward hook|.*checkpointing. is)"
)

NAMES = ["llama", "gpt2"]
PATTERNS = dict(rank_pattern={"0.self_attn.q_proj": 2, "down_proj": 6}, alpha_pattern={"v_proj": 3})
# What changes the frozen weight, each method once.
CHANGED = ["pissa", "pissa_niter_4", "olora", "corda-ipm", "lora-ga-ArB2r-stable", "loftq-4-bits-1"]
# What PEFT loads on the original weights, where it can put it on the model.
LOADED = [
    (name, method)
    for method in METHODS
    for name in NAMES
    if not method.startswith(("corda", "lora-ga")) and not (name == "gpt2" and method.startswith(PEFT_HAS_NO_CONV1D))
]


def logits(model):
    return model.eval()(**make_batch()).logits.detach()


def peft_loads(name, folder):
    torch.manual_seed(SEED)
    with loftq_allowed():
        return peft.PeftModel.from_pretrained(make_model(name), folder)


def fastlora_loads(name, folder, **options):
    torch.manual_seed(SEED)
    return fastlora.load(make_model(name), folder, **options)


def read_config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def exact_logits(name, patched):
    """The logits of a patched model in float64: the original weights with what training changed of the adapter."""
    model = make_model(name).double().eval()
    for module, start in starts(patched).items():
        weight = model.get_submodule(module).weight
        exact = start.weight.double() + start.scaling * (start.b.double() @ start.a.double())
        weight.data.copy_(exact.T if name == "gpt2" else exact)
    return logits(model)


@pytest.mark.parametrize(
    "options", [{}, PATTERNS, PATTERNS | dict(use_rslora=True)], ids=["plain", "patterns", "rslora"]
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", MOVED)
def test_a_saved_adapter_is_for_the_original_weights(method, name, options, tmp_path):
    """Twice the rank, and no decomposition to repeat: in PEFT and here it gives the logits of the trained model."""
    model = disturb(by_fastlora(name, MOVED[method] | options))
    fastlora.save(model, tmp_path)
    config = read_config(tmp_path)
    assert (config["init_lora_weights"], config["corda_config"], config["lora_ga_config"]) == (True, None, None)
    theirs, ours = peft_loads(name, tmp_path), fastlora_loads(name, tmp_path)
    for module, start in starts(model).items():
        loaded = starts(theirs)[module]
        assert len(loaded.a) == 2 * len(start.a)
        assert math.isclose(loaded.scaling, start.scaling, rel_tol=4 * sys.float_info.epsilon)
        assert torch.equal(loaded.a, starts(ours)[module].a)
        assert torch.equal(loaded.b, starts(ours)[module].b)
    exact = exact_logits(name, model)
    assert not torch.allclose(exact.float(), logits(make_model(name)), atol=1e-3)
    for loaded in (theirs, ours):
        assert_as_accurate_as_eager(logits(loaded), logits(model), exact, "logits")


@pytest.mark.parametrize(("name", "method"), LOADED)
def test_loads_what_peft_saved(name, method, tmp_path):
    """A file that names the method: PEFT decomposes, or quantises, the original weight again, and so do we."""
    disturb(by_peft(name, METHODS[method])).save_pretrained(tmp_path)
    assert read_config(tmp_path)["init_lora_weights"] == METHODS[method]["init_lora_weights"]
    theirs, model = peft_loads(name, tmp_path), fastlora_loads(name, tmp_path)
    ours = starts(model)
    for module, start in starts(theirs).items():
        assert torch.equal(ours[module].a, start.a)
        assert torch.equal(ours[module].b, start.b)
        assert ours[module].scaling == start.scaling
        assert method.startswith("loftq-8") or torch.equal(ours[module].weight, start.weight)
    assert_as_accurate_as_eager(logits(model), logits(theirs), logits(copy.deepcopy(theirs).double()), "logits")


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_decomposition_is_saved_for_the_original_weights(name, tmp_path):
    disturb(by_peft(name, METHODS["pissa"])).save_pretrained(tmp_path / "theirs")
    model = fastlora_loads(name, tmp_path / "theirs", trainable=True)
    exact = exact_logits(name, model)
    fastlora.save(disturb(model, seed=4), tmp_path / "ours")
    assert not torch.allclose(exact, exact_logits(name, model), atol=1e-3)
    reloaded = peft_loads(name, tmp_path / "ours")
    assert_as_accurate_as_eager(logits(reloaded), logits(model), exact_logits(name, model), "logits")


@pytest.mark.parametrize(("name", "method"), [(n, m) for m in MOVED for n in NAMES if (n, m) != ("gpt2", "olora")])
def test_loads_what_peft_converted(name, method, tmp_path):
    wrapped = by_peft(name, MOVED[method])
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = MOVED[method]["init_lora_weights"]
    disturb(wrapped)
    wrapped.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=tmp_path / "initial")
    model = fastlora_loads(name, tmp_path / "final")
    assert_as_accurate_as_eager(logits(model), logits(wrapped), exact_logits(name, wrapped), "logits")


def test_a_file_of_lora_ga_is_for_the_weights_it_left(caplog, tmp_path):
    """PEFT puts it on whatever weights the model has."""
    disturb(by_peft("llama", METHODS["lora-ga-ArBr-gd_scale"])).save_pretrained(tmp_path)
    model, theirs = fastlora_loads("llama", tmp_path), peft_loads("llama", tmp_path)
    assert "right only on the weights that its initialisation, LoRA-GA, left" in caplog.text
    assert_as_accurate_as_eager(logits(model), logits(theirs), logits(copy.deepcopy(theirs).double()), "logits")
    fastlora.save(model, tmp_path / "again")
    assert read_config(tmp_path / "again")["init_lora_weights"] == "lora_ga"
    assert all(
        torch.equal(starts(peft_loads("llama", tmp_path / "again"))[n].a, s.a) for n, s in starts(theirs).items()
    )


def test_a_file_of_corda_is_refused_as_in_peft(tmp_path):
    by_peft("llama", METHODS["corda-ipm"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="eigens"):
        peft_loads("llama", tmp_path)
    with pytest.raises(ValueError, match="found one for what 'corda' left of them"):
        fastlora_loads("llama", tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [m for m in METHODS if m.startswith(("eva", "orthogonal", "loftq-4"))])
def test_other_methods_are_saved_by_name(method, name, tmp_path):
    """Their files need no conversion: the frozen weight stays, or quantising it again gives what was trained with."""
    model = disturb(by_fastlora(name, METHODS[method]))
    fastlora.save(model, tmp_path)
    assert read_config(tmp_path)["init_lora_weights"] == METHODS[method]["init_lora_weights"]
    readers = [fastlora_loads] if (name, method[:5]) == ("gpt2", "loftq") else [fastlora_loads, peft_loads]
    for reader in readers:
        loaded = starts(reader(name, tmp_path))
        for module, start in starts(model).items():
            assert torch.equal(loaded[module].a, start.a)
            assert torch.equal(loaded[module].b, start.b)
            assert torch.equal(loaded[module].weight, start.weight)
            assert loaded[module].scaling == start.scaling


def test_files_name_the_settings_as_peft_does(tmp_path):
    settings = dict(init_lora_weights="eva", eva_config=dict(rho=1.0))
    fastlora.save(by_fastlora("llama", settings), tmp_path / "ours")
    by_peft("llama", settings).save_pretrained(tmp_path / "theirs")
    ours, theirs = (read_config(tmp_path / writer) for writer in ("ours", "theirs"))
    for config in (ours, theirs):
        config["target_modules"], config["peft_version"] = len(config["target_modules"]), None
    assert ours["eva_config"]["rho"] == 1.0
    assert ours | dict(target_modules=None) == theirs | dict(target_modules=None)


# The original weights


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", CHANGED)
def test_unload_gives_the_original_weights_back(method, name, quantize):
    fresh = make_model(name)
    before = {module: id(parameter) for module, parameter in fresh.named_parameters()}
    model = by_fastlora(name, METHODS[method], change=lambda _: fresh, quantize=quantize)
    assert not torch.equal(logits(model), logits(make_model(name)))
    disturb(model)
    with fastlora.disabled(model):
        assert torch.equal(logits(model), logits(make_model(name)))
    fastlora.merge(model)
    with fastlora.disabled(model):
        assert torch.equal(logits(model), logits(make_model(name)))
    fastlora.unload(model)
    assert {module: id(parameter) for module, parameter in model.named_parameters()} == before
    assert all(torch.equal(value, tensors(make_model(name))[n]) for n, value in tensors(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), logits(make_model(name)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", CHANGED)
def test_merging_folds_the_adapter_into_what_is_left(method, name):
    model = disturb(by_fastlora(name, METHODS[method]))
    unmerged, exact = logits(model), exact_logits(name, model)
    left = {n: start.weight.clone() for n, start in starts(model).items()}
    fastlora.unmerge(fastlora.merge(model))
    assert all(torch.equal(start.weight, left[n]) for n, start in starts(model).items())
    fastlora.unload(model, merge=True)
    assert type(model) is type(make_model(name))
    assert_as_accurate_as_eager(logits(model), unmerged, exact, "logits")


@pytest.mark.parametrize("name", NAMES)
def test_int8_is_of_what_the_adapter_leaves(name, caplog, tmp_path):
    dense = starts(by_fastlora(name, METHODS["pissa"]))
    model = by_fastlora(name, METHODS["pissa"], quantize="int8")
    for module, layer in lora_layers(model).items():
        codes, scale = ops.quantize_rows(dense[module].weight)
        assert torch.equal(layer.weight, codes)
        assert torch.equal(layer.weight_scale, scale)
    fastlora.save(model, tmp_path)
    assert "whose rounding is not in the file" in caplog.text


def test_a_tied_weight_is_changed_in_one_place():
    """PEFT changes the embedding, too, and the model with it."""
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    config = fastlora.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa")
    before, embedding = logits(model), model.model.embed_tokens.weight.clone()
    fastlora.patch(model, config=config, allow_output_head=True)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    exact = copy.deepcopy(fastlora.unload(copy.deepcopy(model))).double()
    assert_as_accurate_as_eager(logits(model), before, logits(exact), "logits")
    assert fastlora.unload(model).lm_head.weight is model.model.embed_tokens.weight


def test_deleting_brings_the_original_weights_back():
    plain = make_model("llama")
    model = fastlora.patch(
        make_model("llama"), config=fastlora.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, plain.model.layers[0].self_attn.q_proj.weight)
    fastlora.delete_adapter(model, "default")
    fastlora.patch(model, r=2, targets=["q_proj"])
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.weight, plain.get_submodule(name).weight)
