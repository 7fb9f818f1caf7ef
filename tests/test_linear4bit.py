"""Models in bitsandbytes' 4 bits: trained in place, merged and given back, against PEFT's."""

import contextlib
import copy

import peft
import pytest
import torch
from models import make_batch, make_model
from pairs import (
    adapter_of,
    assert_files_go_both_ways,
    assert_same_tensors,
    assert_trains_as_peft,
    fill,
    make_pair,
    train,
)
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora
from fastlora import ops
from fastlora.adapters.registry import lora_layers
from fastlora_kernels import reference

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

# What PEFT says of merging 4-bit layers, and of what it reads from transformers.
pytestmark = pytest.mark.filterwarnings("ignore:(Merge lora module to 4-bit|.*checkpointing. is deprecated)")

TARGETS = ["q_proj", "v_proj", "down_proj"]
SETTINGS = dict(r=4, lora_alpha=8, target_modules=TARGETS)
KINDS = {
    "nf4": {},
    "nf4-double": dict(bnb_4bit_use_double_quant=True),
    "fp4": dict(bnb_4bit_quant_type="fp4"),
    "fp4-double": dict(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "bf16": dict(dtype=torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16),
    "stored-as-bf16": dict(bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_use_double_quant=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(scope="module")
def load_4bit(tmp_path_factory):
    """Loads a small model, quantised on the way."""
    path = tmp_path_factory.mktemp("dense")
    make_model("llama").save_pretrained(path)

    def load(dtype=torch.float32, **settings):
        settings = dict(bnb_4bit_quant_type="nf4") | settings
        config = BitsAndBytesConfig(load_in_4bit=True, **settings)
        return LlamaForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config, device_map="cpu")

    return load


def logits(model):
    return model(input_ids=make_batch(tokens=16, batch=8)["input_ids"]).logits


def linear4bit(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def bits(model):
    """Everything in the state of a model, codes and scales too, as bytes."""
    return {name: tensor.clone().contiguous().view(torch.uint8) for name, tensor in model.state_dict().items()
            if tensor.dim()}  # fmt: skip


def frozen_bits(model):
    return {name: tensor for name, tensor in bits(model).items() if ".lora_" not in name}


def patched(load, settings=SETTINGS, seed=1, **kind):
    return fill(fastlora.patch(load(**kind), config=fastlora.LoraConfig(**settings)), seed).eval()


def dense(model):
    """PEFT's model in float64, with the weights that the codes stand for."""
    model = copy.deepcopy(model)
    for name, module in linear4bit(model).items():
        weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        layer = nn.Linear(module.in_features, module.out_features, bias=False)
        layer.weight.data = weight
        model.set_submodule(name, layer)
    return model.double()


@every_kind
def test_draws_what_peft_draws(load_4bit, kind):
    ours, theirs = make_pair(lambda: load_4bit(**kind), SETTINGS)
    assert_same_tensors(*({name: p.data for name, p in adapter_of(model).items()} for model in (ours, theirs)))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@every_kind
def test_trains_as_peft(load_4bit, kind, dora):
    assert_trains_as_peft(lambda: load_4bit(**kind), SETTINGS | dict(use_dora=dora), logits, exact_of=dense)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_files_go_both_ways(load_4bit, dora, tmp_path):
    assert_files_go_both_ways(load_4bit, SETTINGS | dict(use_dora=dora), logits, tmp_path)


@every_kind
def test_the_frozen_model_is_that_of_bitsandbytes(load_4bit, kind):
    model = load_4bit(**kind).eval()
    expected = logits(model)
    fill(fastlora.patch(model, config=fastlora.LoraConfig(**SETTINGS)), 1)
    assert not torch.equal(logits(model), expected)
    with fastlora.disabled(model):
        assert torch.equal(logits(model), expected)


def test_mixed_batch_equals_each_row_alone(load_4bit):
    """In training, too; rows come in runs, single, and without an adapter."""
    model, rows = patched(load_4bit), ["default", None, "other", "other", "other", "default", None, "default"]
    fastlora.patch(model, config=fastlora.LoraConfig(r=2, target_modules=TARGETS[:2], lora_bias=True), adapter="other")
    fill(model, 2)
    alone = copy.deepcopy(model)
    with fastlora.mixed(model, rows):
        found = logits(model)
        found.square().sum().backward()
    parts = []
    for i, name in enumerate(rows):
        fastlora.set_adapter(alone, name or "other")
        with fastlora.disabled(alone) if name is None else contextlib.nullcontext():
            parts.append(logits(alone)[i])
    expected = torch.stack(parts)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected)
    for (name, one), (_, other) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
        if ".lora_" in name:
            torch.testing.assert_close(one.grad, other.grad)


def test_several_adapters_add_up(load_4bit):
    ours, theirs = (fill(model, 1) for model in make_pair(load_4bit, SETTINGS))
    fastlora.patch(ours, config=fastlora.LoraConfig(**SETTINGS), adapter="second")
    theirs.add_adapter("second", peft.LoraConfig(**SETTINGS))
    for model in (ours, theirs):
        fill(model, 2, "second")
    fastlora.set_adapter(ours, ["default", "second"])
    theirs.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)


def test_dropout_leaves_the_frozen_product_alone(load_4bit):
    """The adapters' part alone changes from call to call, and with DoRA as without a drop on average."""
    model = patched(load_4bit, SETTINGS | dict(lora_dropout=0.5))
    layer, x = lora_layers(model)["model.layers.0.self_attn.q_proj"], torch.randn(6, 48)
    whole, frozen = layer(x), layer._frozen(x)
    drawn = torch.stack([layer.train()(x) for _ in range(2)])
    assert not torch.equal(drawn[0], drawn[1])
    torch.manual_seed(3)
    dropped = layer(x)
    torch.manual_seed(3)
    mask = ops.dropout_mask(torch.randint(2**63 - 1, (1,)), 6, 48, 0.5)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    torch.testing.assert_close(dropped - frozen, 2.0 * (x * mask / 0.5) @ a.T @ b.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole - frozen, 2.0 * x @ a.T @ b.T, rtol=1e-5, atol=1e-5)


def test_bitsandbytes_keeps_no_dense_weight_for_the_backward(load_4bit):
    model = patched(load_4bit).train()
    layer, saved = lora_layers(model)["model.layers.0.mlp.down_proj"], []
    x = torch.randn(5, 80, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        layer(x)
    assert saved
    assert torch.Size([48, 80]) not in saved
    assert torch.Size([80, 48]) not in saved


@every_kind
def test_merge_quantises_the_sum_and_unmerge_restores_every_bit(load_4bit, kind):
    model = patched(load_4bit, **kind)
    before, expected = frozen_bits(model), logits(model)
    sums = {}
    for name, layer in lora_layers(model).items():
        dense = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        a, b = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
        sums[name], _ = reference.merge_rows(dense.float(), None, a, b, 2.0)
    fastlora.merge(model)
    for name, layer in lora_layers(model).items():
        weight, state = layer.weight, layer.weight.quant_state
        codes, wanted = bitsandbytes.functional.quantize_4bit(
            sums[name], blocksize=weight.blocksize, compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type, quant_storage=weight.quant_storage,
        )  # fmt: skip
        assert torch.equal(weight.data.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(state.absmax, wanted.absmax)
        assert state.dtype == kind.get("dtype", torch.float32)
    merged = frozen_bits(model)
    assert any(not torch.equal(merged[name], before[name]) for name in before)
    with fastlora.disabled(model):
        assert_same_tensors(frozen_bits(model), before)
    assert_same_tensors(frozen_bits(model), merged)
    fastlora.unmerge(model)
    assert_same_tensors(frozen_bits(model), before)
    assert torch.equal(logits(model), expected)


def test_merges_the_codes_that_peft_merges(load_4bit):
    ours, theirs = (fill(model, 1) for model in make_pair(load_4bit, SETTINGS))
    fastlora.merge(ours)
    theirs.merge_adapter()
    for name, layer in lora_layers(ours).items():
        merged = theirs.base_model.model.get_submodule(name).base_layer
        assert torch.equal(layer.weight.data, merged.weight.data)
        assert layer.weight.quant_state == merged.weight.quant_state


def test_a_merged_bias_is_scaled(load_4bit):
    """PEFT adds it unscaled to what is in 4 or 8 bits."""
    model = patched(load_4bit, SETTINGS | dict(lora_bias=True))
    name, layer = next(iter(lora_layers(model).items()))
    layer.lora_B_bias["default"].data.normal_()
    fastlora.merge(model)
    assert torch.equal(model.get_submodule(name).bias, 2.0 * layer.lora_B_bias["default"])


def test_a_merge_that_is_not_finite_changes_nothing(load_4bit):
    model = patched(load_4bit)
    before = frozen_bits(model)
    lora_layers(model)["model.layers.1.mlp.down_proj"].lora_B["default"].data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: .*expected a finite merged weight"):
        fastlora.merge(model)
    assert_same_tensors(frozen_bits(model), before)


@pytest.mark.parametrize("merged", [False, True])
@every_kind
def test_unload_gives_the_modules_back(load_4bit, kind, merged):
    model = load_4bit(**kind).eval()
    before, expected, modules = bits(model), logits(model), linear4bit(model)
    kept = {name: (module.weight, set(module.__dict__)) for name, module in modules.items()}
    fill(fastlora.patch(model, config=fastlora.LoraConfig(**SETTINGS)), 1)
    logits(model)
    if merged:
        fastlora.merge(model)
    fastlora.unload(model)
    assert linear4bit(model) == modules
    for name, module in modules.items():
        assert type(module) is bitsandbytes.nn.Linear4bit
        assert module.weight is kept[name][0]
        assert module.weight.quant_state is module.quant_state
        assert set(module.__dict__) == kept[name][1]
    assert_same_tensors(bits(model), before)
    assert torch.equal(logits(model), expected)


def test_unload_merges(load_4bit):
    model = patched(load_4bit)
    expected = frozen_bits(fastlora.merge(copy.deepcopy(model)))
    fastlora.unload(model, merge=True)
    assert_same_tensors(bits(model), expected)
    assert {type(module) for module in linear4bit(model).values()} == {bitsandbytes.nn.Linear4bit}


def test_transformers_counts_it_as_quantised_before_and_after(load_4bit):
    model = load_4bit()
    fastlora.patch(model, r=4, targets=TARGETS)
    fastlora.patch(model, r=4, targets=TARGETS, adapter="second")
    assert not any(getattr(model, name, None) for name in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer"))
    fastlora.unload(model)
    assert model.is_quantized
    assert model.is_loaded_in_4bit
    assert model.config.quantization_config.load_in_4bit


def test_trainer_takes_steps(load_4bit, tmp_path):
    model = fastlora.patch(load_4bit(), r=4, targets=TARGETS)
    before = frozen_bits(model)
    examples = [{key: value[0] for key, value in make_batch(seed=seed).items()} for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    assert Trainer(model=model, args=arguments, train_dataset=examples).train().global_step == 2
    assert all(layer.lora_B["default"].any() for layer in lora_layers(model).values())
    assert_same_tensors(frozen_bits(model), before)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_compiles_without_a_graph_break(load_4bit, dora):
    torch.compiler.reset()
    model = patched(load_4bit, SETTINGS | dict(use_dora=dora, lora_dropout=0.2)).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (model, compiled):
        torch.manual_seed(7)
        model.zero_grad()
        y = logits(call)
        y.square().mean().backward()
        results.append({"y": y.detach()} | {name: p.grad.clone() for name, p in adapter_of(model).items()})
    assert_same_tensors(*results)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_bit(load_4bit, reentrant):
    model = patched(load_4bit).train()
    expected = train(model, adapter_of(model), logits, steps=1)
    model = patched(load_4bit).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_tensors(train(model, adapter_of(model), logits, steps=1), expected)


def test_a_copy_is_independent(load_4bit):
    model = patched(load_4bit)
    expected, duplicate = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(duplicate), expected)
    fastlora.merge(fill(duplicate, 9))
    assert torch.equal(logits(model), expected)


def test_computes_in_the_dtype_that_bitsandbytes_would(load_4bit):
    """A compute dtype other than the input's is the frozen product's alone."""
    model = load_4bit(bnb_4bit_compute_dtype=torch.bfloat16).eval()
    expected = logits(model)
    fastlora.patch(model, config=fastlora.LoraConfig(**SETTINGS))
    assert logits(model).dtype == torch.float32
    assert torch.equal(logits(model), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(fastlora.unload(copy.deepcopy(model))))


def test_unpacks_what_bitsandbytes_packed_for_inference():
    """On some CPUs its forward does so, in place, and then has no backward."""
    torch.manual_seed(0)
    module = bitsandbytes.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", compress_statistics=False).to("cpu")
    codes = module.weight.data.clone()
    pack = bitsandbytes.functional._convert_weight_packed_for_cpu
    module.weight.data, _ = pack(module.weight.data, module.weight.quant_state)
    assert not torch.equal(module.weight.data.flatten(), codes.flatten())
    model = fastlora.patch(nn.Sequential(module), r=4, targets=["0"])
    assert torch.equal(module.weight.data, codes)
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_says_what_computes(load_4bit, caplog):
    with caplog.at_level("INFO", logger="fastlora"):
        fastlora.patch(load_4bit(), r=4, targets=TARGETS)
    assert "6 layers, weights in float32; codes of 4 bits by bitsandbytes" in caplog.text


def test_all_linear_takes_them(load_4bit):
    ours, theirs = make_pair(load_4bit, dict(r=4, target_modules="all-linear"))
    assert adapter_of(ours).keys() == adapter_of(theirs).keys()


def test_codes_are_no_parameters_to_adapt(load_4bit):
    config = fastlora.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
    for kind in ({}, KINDS["stored-as-bf16"]):
        with pytest.raises(TypeError, match=r"target_parameters: expected one of .*, found 4-bit codes at"):
            fastlora.patch(load_4bit(**kind), config=config)


def test_refuses_another_quantisation(load_4bit):
    model = load_4bit()
    before = bits(model)
    with pytest.raises(ValueError, match="quantize: expected None for layers in 4 bits already, found 'int8'"):
        fastlora.patch(model, r=4, targets=TARGETS, quantize="int8")
    assert_same_tensors(bits(model), before)
    assert {type(module) for module in linear4bit(model).values()} == {bitsandbytes.nn.Linear4bit}
