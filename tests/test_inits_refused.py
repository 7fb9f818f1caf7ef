"""What initialisations refuse, and that looking at data leaves no trace in the model, whether it ends well or not."""

import sys

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import make_batch, make_model
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from peft_inits import METHODS, calibration, disturb, loftq_allowed, settings_of, starts
from torch import nn

import fastlora
from fastlora.inits import initial_adapters
from fastlora.inits.corda import covariances
from fastlora.inits.target import make_targets
from fastlora.models.targets import find_targets

DATA_DRIVEN = ["eva", "corda", "lora_ga"]
WEIGHT_DRIVEN = ["pissa", "pissa_niter_4", "olora", "loftq"]


def config_for(method, name="llama", **settings):
    return fastlora.LoraConfig(**settings_of(name, init_lora_weights=method, **settings))


def lived_in(name="llama"):
    """A model with everything that must be left alone: modes, gradients, hooks and frozen parameters of its own."""
    model = make_model(name).train()
    model.get_submodule("model.layers.1").eval()
    model(**make_batch()).loss.backward()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = None
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    model.model.register_buffer("seen", torch.zeros(1))
    model.model.register_forward_hook(lambda module, *_: module.seen.add_(1) and None)
    return model


def snapshot(model):
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    plain = {
        "modules": {n: (type(m), m.training, *(list(getattr(m, h)) for h in hooks)) for n, m in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "identities": {n: (id(p), id(p.grad), p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {name: id(buffer) for name, buffer in model.named_buffers()},
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = {name: tensor.detach().clone() for name, tensor in named if not tensor.is_meta}
    gradients = {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return plain, tensors | gradients | {"generator": torch.get_rng_state()}


def assert_same(before, after):
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    for name, tensor in before[1].items():
        assert torch.equal(tensor.nan_to_num(), after[1][name].nan_to_num()), name


def refused(model, message, config, error=ValueError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        fastlora.patch(model, config=config, **options)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("method", METHODS)
def test_looking_leaves_no_trace(method):
    model, config = lived_in(), config_for(METHODS[method]["init_lora_weights"], **nested(method))
    before = snapshot(model)
    needed = calibration() if config.init_lora_weights in DATA_DRIVEN else None
    assert initial_adapters(model, find_targets(model, config)[1], config, needed)
    after = snapshot(model)
    if config.init_lora_weights in [*WEIGHT_DRIVEN, "eva", "corda"] and "niter" not in method:
        assert torch.equal(before[1].pop("generator"), after[1].pop("generator"))
    else:
        assert not torch.equal(before[1].pop("generator"), after[1].pop("generator"))
    assert_same(before, after)


def nested(method):
    return {key: value for key, value in METHODS[method].items() if key.endswith("_config")}


@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_an_error_on_the_way_leaves_no_trace(method):
    def broken():
        yield make_batch(tokens=16, batch=4)
        torch.randn(3)
        raise RuntimeError("the disk is gone")

    refused(lived_in(), "the disk is gone", config_for(method), RuntimeError, calibration=broken())


def test_an_error_after_the_first_draw_leaves_no_trace(monkeypatch):
    decompose, calls = torch.svd_lowrank, []

    def fails_later(*arguments, **options):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("no convergence")
        return decompose(*arguments, **options)

    monkeypatch.setattr(torch, "svd_lowrank", fails_later)
    refused(lived_in(), "no convergence", config_for("pissa_niter_4"), RuntimeError)


@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_calibration_that_does_not_fit(method):
    model, config = lived_in(), config_for(method)
    refused(model, f"calibration: expected batches for init_lora_weights='{method}', found None", config)
    refused(model, "calibration: expected at least one batch, found none", config, calibration=[])
    refused(model, "calibration: expected batches of .*, found str", config, TypeError, calibration=make_batch())
    refused(model, "calibration: expected an iterable of batches, found int", config, TypeError, calibration=3)
    model.unused = nn.Linear(48, 48)
    config = config_for(method, target_modules=["q_proj", "unused"])
    refused(model, "calibration: expected .* every target, found none at 'unused'", config, calibration=calibration())


def test_calibration_without_use():
    refused(lived_in(), "calibration: expected with .*, found with 'pissa'", config_for("pissa"), calibration=[])


def test_lora_ga_needs_labels():
    batches = [{"input_ids": batch["input_ids"]} for batch in calibration()]
    refused(lived_in(), "calibration: .*with labels, found .*no loss", config_for("lora_ga"), calibration=batches)


def test_lora_ga_needs_finite_gradients():
    model = make_model("llama")
    model.lm_head.weight.data[3] = float("inf")
    refused(
        model, "finite gradient at every target, found inf or nan at", config_for("lora_ga"), calibration=calibration()
    )


def test_eva_needs_as_many_tokens_as_components():
    few = [make_batch(tokens=7, batch=1)]
    refused(lived_in(), "a batch of at least 8 tokens for 'model.layers.0", config_for("eva"), calibration=few)


def test_eva_ends_where_components_do_not_settle(monkeypatch):
    monkeypatch.setattr("fastlora.inits.eva.MAX_PASSES", 1)
    message = "settle within 1 passes, found that those of 'model.layers.0.*lower tau than 0.99"
    refused(lived_in(), message, config_for("eva"), calibration=calibration())


def test_corda_needs_finite_inputs():
    model = make_model("llama")
    model.model.embed_tokens.weight.data.fill_(float("nan"))
    refused(
        model, "finite inputs .* at 'model.layers.0.self_attn.q_proj'", config_for("corda"), calibration=calibration()
    )


@pytest.mark.parametrize(
    ("method", "most"),
    [("pissa", 24), ("pissa_niter_4", 24), ("olora", 24), ("loftq", 24), ("corda", 24), ("lora_ga", 12)],
)
def test_a_rank_above_the_weights_is_refused(method, most):
    message = (
        rf"r: expected a rank of at most {most} for '{method}' at 'model.layers.0.self_attn.v_proj', found {most + 1}"
    )
    needed = calibration() if method in DATA_DRIVEN else None
    refused(lived_in(), message, config_for(method, r=most + 1), calibration=needed)


def test_an_odd_rank_cannot_be_orthogonal():
    config = config_for("orthogonal", rank_pattern={"v_proj": 3})
    refused(
        lived_in(), "r: expected an even rank for 'orthogonal', found 3 at 'model.layers.0.self_attn.v_proj'", config
    )


@pytest.mark.parametrize("method", WEIGHT_DRIVEN)
def test_weights_that_are_not_finite_are_refused(method):
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = float("nan")
    refused(model, r"finite weights, found inf or nan in model\.layers\.1\.mlp\.down_proj", config_for(method))


@pytest.mark.parametrize("method", [*WEIGHT_DRIVEN, *DATA_DRIVEN])
def test_weights_without_content_are_refused(method):
    needed = calibration() if method in DATA_DRIVEN else None
    refused(make_model("llama").to("meta"), "on the meta device", config_for(method), calibration=needed)


@pytest.mark.parametrize("method", [True, False, "gaussian", "orthogonal"])
def test_random_adapters_need_no_content(method):
    model = fastlora.patch(make_model("llama").to("meta"), config=config_for(method))
    assert all(start.a.is_meta and start.b.is_meta for start in starts(model).values())
    assert starts(model)["model.layers.0.self_attn.v_proj"].b.shape == (24, 4)


def test_loftq_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    refused(lived_in(), "expected bitsandbytes to be installed for 4 bits", config_for("loftq"))


@pytest.mark.parametrize("method", ["pissa", "lora_ga"])
def test_changed_weights_are_for_one_adapter(method, tmp_path):
    needed = calibration() if method in DATA_DRIVEN else None
    model = fastlora.patch(make_model("llama"), r=4, targets=["up_proj"])
    message = rf"'{method}' changes the frozen weights, expected a model without adapters, found \['default'\]"
    refused(model, message, config_for(method), calibration=needed, adapter="second")
    fastlora.save(model, tmp_path)
    fastlora.patch(fastlora.unload(model), config=config_for(method), calibration=needed)
    message = r"model: expected its original weights, found what the initialisation of \['default'\] left of them"
    refused(model, message, config_for(True), adapter="second")
    with pytest.raises(ValueError, match=message):
        fastlora.load(model, tmp_path, "second")
    fastlora.load(fastlora.unload(model), tmp_path)


def test_eva_looks_at_the_model_without_its_adapters():
    model = disturb(fastlora.patch(make_model("llama"), config=config_for(True, target_modules="all-linear")))
    fastlora.patch(model, config=config_for("eva"), adapter="second", calibration=calibration())
    fresh = starts(fastlora.patch(make_model("llama"), config=config_for("eva"), calibration=calibration()))
    assert {n: layer.lora_A["second"].shape[0] for n, layer in model.named_modules() if n in fresh} == {
        name: len(start.a) for name, start in fresh.items()
    }
    assert all(torch.equal(model.get_submodule(n).lora_A["second"], start.a) for n, start in fresh.items())


def test_corda_leaves_padding_out():
    """A padded batch gives the covariances of its rows without padding."""

    def found(dtype, batches):
        model, config = make_model("llama", dtype), config_for("corda")
        targets = make_targets(find_targets(model, config)[1], config)
        return covariances(model, targets, config.corda_config | dict(use_float16_for_covariance=True), batches)

    padded = calibration(padded=True)
    rows = [
        {"input_ids": ids[kept][None]}
        for batch in padded
        for ids, kept in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    ]
    ours, eager, exact = found(torch.float32, padded), found(torch.float32, rows), found(torch.float64, rows)
    for name in exact:
        assert_as_accurate_as_eager(ours[name], eager[name], exact[name], name)


# Settings

NESTED = {
    "loftq_config": ("loftq", LoftQConfig(loftq_iter=3)),
    "eva_config": ("eva", EvaConfig(rho=3.0)),
    "corda_config": ("corda", CordaConfig(corda_method="kpm")),
    "lora_ga_config": ("lora_ga", LoraGAConfig(scale="unit")),
}
BAD_SETTINGS = {
    "eva_config": [dict(rho=0.5), dict(tau=1.5), dict(whiten=1), dict(label_mask_value=1.5), dict(rho="2")],
    "loftq_config": [dict(loftq_bits=3), dict(loftq_iter=0), dict(loftq_iter=True)],
    "corda_config": [dict(corda_method="xpm"), dict(cache_file="a.pt"), dict(covariance_file="a.pt")],
    "lora_ga_config": [dict(direction="AB"), dict(scale="other"), dict(stable_gamma=0)],
}


@pytest.mark.parametrize("name", NESTED)
def test_reads_the_settings_of_a_peft_config(name):
    method, values = NESTED[name]
    with loftq_allowed():
        config = peft.LoraConfig(init_lora_weights=method, **{name: values})
    theirs = config.to_dict()[name]
    assert getattr(fastlora.LoraConfig.from_peft(config), name) == theirs
    short = {key: value for key, value in theirs.items() if value != getattr(type(values)(), key)}
    assert len(short) == 1
    assert getattr(fastlora.LoraConfig(init_lora_weights=method, **{name: short}), name) == theirs


@pytest.mark.parametrize("name", NESTED)
def test_refuses_settings_that_do_not_exist(name):
    method, _ = NESTED[name]
    for init in (method, True):
        with pytest.raises(ValueError, match=rf"{name}: expected keys among \[.*\], found 'rank'"):
            fastlora.LoraConfig(init_lora_weights=init, **{name: {"rank": 3}})
        with pytest.raises(TypeError, match=f"{name}: expected a dictionary, found int"):
            fastlora.LoraConfig(init_lora_weights=init, **{name: 3})
    for bad in BAD_SETTINGS[name]:
        with pytest.raises(ValueError, match=rf"{name}\['{next(iter(bad))}'\]: expected .*, found "):
            fastlora.LoraConfig(init_lora_weights=method, **{name: bad})


@pytest.mark.parametrize("method", ["mica", "pissa_niter_", "pissa_niter_x", "pissa_niter_N", "PISSA", 1.5, None])
def test_refuses_methods_that_do_not_exist(method):
    with pytest.raises(ValueError, match="init_lora_weights: expected one of"):
        fastlora.LoraConfig(init_lora_weights=method)


def test_settings_of_another_method_have_no_effect(caplog):
    fastlora.config._warn_of_idle_settings.cache_clear()
    fastlora.LoraConfig(init_lora_weights="olora", eva_config=dict(rho=3.0))
    assert "eva_config: has no effect without init_lora_weights='eva'" in caplog.text
