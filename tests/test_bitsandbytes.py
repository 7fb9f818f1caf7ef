"""Models in bitsandbytes' 8 bits: taken over, trained and given back; and the same quantisation of our own."""

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import make_batch, make_model
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora
from fastlora import ops
from fastlora.adapters.registry import lora_layers

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = {
    "random": lambda: torch.randn(37, 100) * 0.05,
    "one-row": lambda: torch.randn(1, 63),
    "one-column": lambda: torch.randn(5, 1),
    "zero-row": lambda: torch.cat([torch.randn(3, 64), torch.zeros(2, 64), torch.randn(1, 64)]),
    "all-zero": lambda: torch.zeros(4, 16),
    "tiny": lambda: torch.randn(16, 40) * 1e-6,
    "subnormal-in-float16": lambda: torch.randn(16, 40) * 1e-7,
    "below-float16": lambda: torch.randn(16, 40) * 1e-12,
    "huge": lambda: torch.randn(16, 40).clamp(-4, 4) * 16000,
    "one-outlier": lambda: torch.randn(16, 40).index_fill_(1, torch.tensor([7]), 60000.0),
    "halves": lambda: torch.arange(-127, 128).repeat(2, 1) / 2 + torch.tensor([[0.0], [63.5]]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint for transformers to quantise while it loads."""
    path = tmp_path_factory.mktemp("dense")
    make_model("llama").save_pretrained(path)
    return path


def load_8bit(folder, dtype=torch.float32):
    config = BitsAndBytesConfig(load_in_8bit=True)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")


def linear8bit(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}


def codes_and_absmax(module):
    """CB and SCB of a `Linear8bitLt`, which its first forward moves from the weight to the state."""
    holder = module.weight if module.state.SCB is None else module.state
    return holder.CB.clone(), holder.SCB.clone()


@torch.no_grad()
def logits(model):
    return model(input_ids=make_batch()["input_ids"]).logits


def quantised_in_transformers(model):
    names = ("is_quantized", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")
    return {name for name in names if getattr(model, name, None)} | (
        {"quantization_config"} if getattr(model.config, "quantization_config", None) else set()
    )


@pytest.mark.parametrize("forward_first", [False, True], ids=["fresh", "after-a-forward"])
def test_takes_over_the_same_codes_and_scales(folder, forward_first):
    model = load_8bit(folder)
    if forward_first:
        logits(model)
        assert all(m.state.SCB is not None for m in linear8bit(model).values())
    before = {name: codes_and_absmax(module) for name, module in linear8bit(model).items()}
    fastlora.patch(model, r=4, targets=TARGETS)
    layers = lora_layers(model)
    assert layers.keys() == before.keys()
    assert not linear8bit(model)
    for name, (codes, absmax) in before.items():
        assert layers[name].weight.dtype == torch.int8
        assert torch.equal(layers[name].weight, codes)
        assert torch.equal(layers[name].weight_scale, absmax / 127)


def test_takes_over_an_8bit_checkpoint(folder, tmp_path):
    load_8bit(folder).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    before = {name: codes_and_absmax(module) for name, module in linear8bit(model).items()}
    fastlora.patch(model, r=4, targets=TARGETS)
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.weight, before[name][0])
        assert torch.equal(layer.weight_scale, before[name][1] / 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_computes_with_the_dequantised_weights(folder, dtype):
    """Unlike bitsandbytes, which rounds the input to float16 and on a GPU to int8."""
    model = load_8bit(folder, dtype)
    fastlora.patch(model, r=4, targets=TARGETS)
    eager, exact = LlamaForCausalLM.from_pretrained(folder, dtype=dtype), LlamaForCausalLM.from_pretrained(folder)
    exact.to(dtype).double()  # through `dtype`, for the weights that stayed dense
    for name, layer in lora_layers(model).items():
        dense = layer.weight.double() * layer.weight_scale.double()[:, None]
        for copy in (eager, exact):
            copy.get_submodule(name).weight.data = dense.to(copy.dtype)
    assert_as_accurate_as_eager(logits(model), logits(eager), logits(exact), "logits")


def test_trains_the_adapters_alone(folder):
    model = fastlora.patch(load_8bit(folder), r=4, targets=TARGETS, dropout=0.1).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**make_batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
        assert name not in frozen or torch.equal(parameter, frozen[name]), name


def test_transformers_no_longer_counts_it_as_quantised(folder):
    model = load_8bit(folder)
    assert quantised_in_transformers(model)
    fastlora.patch(model, r=4, targets=TARGETS)
    assert not quantised_in_transformers(model)


def test_trainer_takes_a_step(folder, tmp_path):
    model = fastlora.patch(load_8bit(folder), r=4, targets=TARGETS)
    examples = [{key: value[0] for key, value in make_batch(seed=seed).items()} for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trained = Trainer(model=model, args=arguments, train_dataset=examples).train()
    assert trained.global_step == 2
    assert all(layer.lora_B["default"].any() for n, layer in lora_layers(model).items() if n.endswith(tuple(TARGETS)))


@pytest.mark.parametrize("forward_first", [False, True], ids=["fresh", "after-a-forward"])
def test_unload_gives_back_the_modules_of_bitsandbytes(folder, forward_first):
    model, expected = load_8bit(folder), logits(load_8bit(folder))
    if forward_first:
        logits(model)
    before = {name: codes_and_absmax(module) for name, module in linear8bit(model).items()}
    fastlora.patch(model, r=4, targets=TARGETS)
    fastlora.unload(model)
    after = linear8bit(model)
    assert after.keys() == before.keys()
    for name, module in after.items():
        assert type(module) is bitsandbytes.nn.Linear8bitLt
        assert isinstance(module.weight, bitsandbytes.nn.Int8Params)
        for value, original in zip(codes_and_absmax(module), before[name], strict=True):
            assert value.dtype == original.dtype
            assert torch.equal(value, original), name
    assert torch.equal(logits(model), expected)


def test_an_unloaded_model_is_quantised_for_transformers_again(folder, tmp_path):
    """Otherwise its checkpoint has int8 weights and nothing that says so, and loads as something else."""
    model = load_8bit(folder)
    before, expected = quantised_in_transformers(model), logits(model)
    fastlora.patch(model, r=4, targets=TARGETS)
    fastlora.unload(model)
    assert quantised_in_transformers(model) == before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected)


def test_a_failed_patch_leaves_the_model_to_bitsandbytes(folder):
    model = load_8bit(folder)
    before, modules, expected = quantised_in_transformers(model), linear8bit(model).keys(), logits(model)
    with pytest.raises(ValueError, match="targets"):
        fastlora.patch(model, r=4, targets=["nothing"])
    assert quantised_in_transformers(model) == before
    assert linear8bit(model).keys() == modules
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_quantises_as_bitsandbytes_does(weight, dtype, device):
    w = weight().to(device, dtype)
    codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(w.half())
    q, scale = ops.quantize_rows(w)
    assert torch.equal(q, codes), f"{(q != codes).float().mean():.1%} of the codes differ"
    assert torch.equal(scale, absmax / 127)


def test_quantises_a_model_as_bitsandbytes_does(folder):
    ours = fastlora.patch(make_model("llama"), r=4, targets="all-linear", quantize="int8")
    theirs = linear8bit(load_8bit(folder))
    layers = lora_layers(ours)
    assert layers.keys() == theirs.keys()
    for name, layer in layers.items():
        codes, absmax = codes_and_absmax(theirs[name])
        assert torch.equal(layer.weight, codes)
        assert torch.equal(layer.weight_scale, absmax / 127)
        assert isinstance(layer, nn.Linear)


def test_olora_moves_a_part_of_the_codes_into_the_adapter(folder):
    """PEFT's codes: the dequantised weight without the adapter, quantised again; `unload` gives back the first ones."""
    settings = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="olora")
    wrapped = peft.get_peft_model(load_8bit(folder), peft.LoraConfig(**settings))
    model = load_8bit(folder)
    before = {name: codes_and_absmax(module) for name, module in linear8bit(model).items()}
    fastlora.patch(model, config=fastlora.LoraConfig(**settings))
    for name in [name for name in before if name.endswith(("q_proj", "v_proj"))]:
        layer, theirs = model.get_submodule(name), wrapped.base_model.model.get_submodule(name)
        assert not torch.equal(layer.weight, before[name][0])
        assert torch.equal(layer.weight, theirs.base_layer.weight.data)
        # The weight is the one before, up to half a step and the rounding to float16 before it.
        codes, absmax = (tensor.double() for tensor in before[name])
        a, b, scale = (
            p.detach().double() for p in (layer.lora_A["default"], layer.lora_B["default"], layer.weight_scale)
        )
        left = codes * absmax[:, None] / 127 - layer.scaling["default"] * b @ a
        allowed = scale[:, None] / 2 + torch.finfo(torch.float16).eps * left.abs()
        assert ((left - layer.weight.double() * scale[:, None]).abs() <= allowed).all()
    fastlora.unload(model)
    after = {name: codes_and_absmax(module) for name, module in linear8bit(model).items()}
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], after[name], strict=True))


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_2", "loftq", "corda", "lora_ga"])
def test_other_decompositions_refuse_int8(folder, method):
    model = load_8bit(folder)
    before = {name: codes_and_absmax(module) for name, module in linear8bit(model).items()}
    config = fastlora.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=method)
    with pytest.raises(ValueError, match=f"'{method}' expected a dense weight, found int8 at 'model.layers.0"):
        fastlora.patch(model, config=config, calibration=[make_batch()] if method in ("corda", "lora_ga") else None)
    after = {name: codes_and_absmax(module) for name, module in linear8bit(model).items()}
    assert all(torch.equal(x, y) for name in before for x, y in zip(before[name], after[name], strict=True))


def test_eva_looks_at_int8_layers(folder):
    model = load_8bit(folder)
    config = fastlora.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=dict(rho=1.0))
    before = logits(model)
    fastlora.patch(model, config=config, calibration=[make_batch(tokens=16, batch=4)])
    assert all(layer.lora_A["default"].any() for name, layer in lora_layers(model).items() if name.endswith("q_proj"))
    reference = make_model("llama").double()
    assert_as_accurate_as_eager(logits(model), before, logits(reference), "logits")
