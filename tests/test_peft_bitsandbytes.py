"""PeftModels over bitsandbytes' 8 and 4 bits on fastlora's ops."""

import copy

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import make_batch, make_model
from peft_models import logits, patched
from test_against_peft import fill, flat, in_units_of, parameters, train, wrap
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastlora
from fastlora.integrations.peft import plan

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

# What bitsandbytes and PEFT say of their own roundings and casts.
pytestmark = pytest.mark.filterwarnings("ignore:(MatMul8bitLt|(Unm|M)erge lora module|.*checkpointing.* is deprecated)")

TARGETS = ["q_proj", "v_proj", "down_proj"]
EIGHT, FOUR = dict(load_in_8bit=True), dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense checkpoint for transformers to quantise while it loads."""
    path = tmp_path_factory.mktemp("dense")
    make_model("llama").save_pretrained(path)
    return path


def load_base(folder, bits, dtype=torch.float32):
    config = BitsAndBytesConfig(**bits)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, device_map="cpu")


def load(folder, bits, dtype=torch.float32, seed=0, **settings):
    settings = dict(r=4, lora_alpha=8, target_modules=TARGETS) | settings
    return fill(wrap(load_base(folder, bits, dtype), **settings), seed)


def make_pair(folder, bits=EIGHT, dtype=torch.float32, **settings):
    """A patched PeftModel and its unpatched twin."""
    return fastlora.patch(load(folder, bits, dtype, **settings)), load(folder, bits, dtype, **settings)


def codes_and_absmax(module):
    """CB and SCB of a `Linear8bitLt`, which its first forward moves from the weight to the state."""
    holder = module.weight if module.state.SCB is None else module.state
    return holder.CB, holder.SCB


def linear8bit(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}


def dense_twin(model, folder, dtype):
    """The model in float64, with every 8-bit weight dequantised and the others as they are in `dtype`."""
    base = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).double()
    twin = wrap(base, r=4, lora_alpha=8, target_modules=TARGETS).double()
    for name, module in linear8bit(model).items():
        codes, absmax = codes_and_absmax(module)
        twin.get_submodule(name).weight.data = codes.double() * absmax.double()[:, None] / 127
    for name, value in parameters(model).items():
        parameters(twin)[name].data.copy_(value.data)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trains_as_accurately_as_peft(folder, dtype):
    """In training on a CPU bitsandbytes multiplies with the dequantised weight, as the op does."""
    runs = {"fastlora": [], "peft": [], "exact": []}
    for seed in range(3):
        ours, twin = make_pair(folder, dtype=dtype, seed=seed)
        models = {"fastlora": ours, "peft": twin, "exact": dense_twin(twin, folder, dtype)}
        for kind, model in models.items():
            runs[kind].append(train(model.train(), make_batch(tokens=16, batch=8)))
    for key in ("logits", "trained logits"):
        assert_as_accurate_as_eager(*(flat([run[key] for run in runs[kind]]) for kind in runs), key)
    exact = [run["gradients"] for run in runs["exact"]]
    gradients = [flat(in_units_of(exact, [run["gradients"] for run in runs[kind]])) for kind in runs]
    assert_as_accurate_as_eager(*gradients, "gradients")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_more_accurate_than_bitsandbytes(folder, dtype, calls):
    """Which rounds the input to 8 bits in evaluation, where the patched layers do not; the other layers are dense."""
    ours, twin = make_pair(folder, dtype=dtype)
    exact = dense_twin(twin, folder, dtype)
    layers = {name: module for name, module in exact.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        x = torch.randn(5, layer.in_features).to(dtype)
        expected = layer(x.double())
        errors = [(model.eval().get_submodule(name)(x).double() - expected).square().mean() for model in (ours, twin)]
        assert errors[0] < errors[1], name
    assert len(calls) == len(layers) == 6


def test_patching_leaves_bitsandbytes_its_weights(folder):
    ours, twin = make_pair(folder)
    assert logits(ours).isfinite().all()
    for module, other in zip(ours.modules(), twin.modules(), strict=True):
        assert issubclass(type(module), type(other))
    assert {verdict for _, verdict, _ in plan(ours)} == {"fast"}
    fastlora.unload(ours)
    assert torch.equal(logits(ours.eval()), logits(twin.eval()))
    assert [type(module) for module in ours.modules()] == [type(module) for module in twin.modules()]


def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


@pytest.mark.parametrize("forward_first", [False, True], ids=["fresh", "after-a-forward"])
@pytest.mark.parametrize("operate", [lambda model: model.merge_adapter(), merge_and_back], ids=["merge", "and-unmerge"])
def test_merges_as_peft_does(folder, operate, forward_first, calls):
    ours, twin = make_pair(folder)
    for model in (ours, twin):
        if forward_first:
            logits(model.eval())
        operate(model)
    pairs = zip(linear8bit(ours).values(), linear8bit(twin).values(), strict=True)
    assert all(torch.equal(*values) for pair in pairs for values in zip(*map(codes_and_absmax, pair), strict=True))
    calls.clear()
    batch = make_batch()
    exact = dense_twin(twin, folder, torch.float32)
    if operate is not merge_and_back:
        exact.base_model.disable_adapter_layers()
    actual, eager = (model.train()(**batch).logits.detach() for model in (ours, twin))
    assert_as_accurate_as_eager(actual, eager, exact(**batch).logits.detach(), "logits")
    assert len(calls) == len(patched(ours)) == 6


def test_merges_for_good_as_peft_does(folder):
    ours, twin = (model.merge_and_unload() for model in make_pair(folder))
    assert [type(module) for module in ours.modules()] == [type(module) for module in twin.modules()]
    assert torch.equal(logits(ours.eval()), logits(twin.eval()))


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_an_untrained_adapter_changes_nothing(folder, train):
    """A model that is its own frozen reference, with the adapters disabled, starts with a divergence of nothing."""
    model = fastlora.patch(load(folder, EIGHT)).train(train)
    for layer in patched(model):
        nn.init.zeros_(layer.lora_B["default"].weight)
    with model.disable_adapter():
        expected = logits(model)
    assert torch.equal(logits(model), expected)


def test_disabling_a_merged_adapter_unmerges_it_as_in_peft(folder):
    ours, twin = make_pair(folder)
    for model in (ours, twin):
        model.eval().merge_adapter()
    with ours.disable_adapter(), twin.disable_adapter():
        logits(ours)
        assert torch.equal(logits(twin), logits(twin))
    assert not any(layer.merged for layer in patched(ours))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_gives_the_dtype_of_peft(folder, x_dtype, autocast):
    ours, twin = make_pair(folder)
    name = next(name for name, module in ours.named_modules() if hasattr(module, "lora_A"))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for x in (torch.randn(4, 48).to(x_dtype), torch.randn(2, 3, 48).to(x_dtype)):
            results = [model.get_submodule(name)(x) for model in (ours, twin)]
            assert results[0].dtype == results[1].dtype
            assert results[0].shape == results[1].shape


def test_saves_and_copies(folder, tmp_path, calls):
    ours, twin = make_pair(folder)
    for model, name in ((ours, "ours"), (twin, "twin")):
        model.eval().save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ours", "twin")]
    assert files[0] == files[1]
    state = ours.state_dict()
    assert state.keys() == twin.state_dict().keys()
    expected = logits(ours)
    loaded = fastlora.patch(load(folder, EIGHT, seed=8))
    loaded.load_state_dict(state)
    reloaded = fastlora.patch(peft.PeftModel.from_pretrained(load_base(folder, EIGHT), tmp_path / "ours"))
    for other in (copy.deepcopy(ours), loaded, reloaded):
        calls.clear()
        assert torch.equal(logits(other.eval()), expected)
        assert len(calls) == 6


def test_trainer_takes_a_step(folder, tmp_path, calls):
    base = peft.prepare_model_for_kbit_training(
        load_base(folder, EIGHT, torch.bfloat16), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = fastlora.patch(wrap(base, r=4, target_modules=TARGETS, lora_dropout=0.1))
    before = {name: value.detach().clone() for name, value in parameters(model).items()}
    examples = [{key: value[0] for key, value in make_batch(seed=seed).items()} for seed in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    assert Trainer(model=model, args=arguments, train_dataset=examples).train().global_step == 2
    assert calls
    assert all(not torch.equal(value, before[name]) for name, value in parameters(model).items())


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
def test_compiles_without_a_graph_break(folder, train):
    torch.compiler.reset()
    model = fastlora.patch(load(folder, EIGHT, lora_dropout=0.2)).train(train)
    results = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        torch.manual_seed(2)
        call(**make_batch()).loss.backward()
        results.append({name: p.grad.clone() for name, p in parameters(model).items()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Doubled8bitLt(bitsandbytes.nn.Linear8bitLt):
    def forward(self, x):
        return 2 * super().forward(x)


def make_8bit_layer(base):
    model = nn.Sequential(base)
    model.is_loaded_in_8bit = True
    return fastlora.patch(wrap(model, r=2, target_modules=["0"]))


def test_a_weight_that_is_not_quantised_yet_is_left_to_peft(calls):
    model = make_8bit_layer(bitsandbytes.nn.Linear8bitLt(24, 20, has_fp16_weights=False))
    assert plan(model)[0][1:] == ("fallback", "an 8-bit base layer that is not quantised yet")
    model(torch.randn(3, 24))
    assert not calls
    assert plan(model)[0][1] == "fast"
    assert model(torch.randn(3, 24)).isfinite().all()
    assert len(calls) == 1


OTHER_BASES = {
    "a base layer of class Doubled8bitLt": lambda: Doubled8bitLt(24, 20, has_fp16_weights=False),
    "an 8-bit base layer that keeps its weight in float16": lambda: bitsandbytes.nn.Linear8bitLt(24, 20),
}


@pytest.mark.parametrize("reason", OTHER_BASES)
def test_other_bases_are_left_to_peft(reason, calls):
    model = make_8bit_layer(OTHER_BASES[reason]())
    for _ in range(2):  # the first call quantises
        model(torch.randn(3, 24))
        assert plan(model)[0][1:] == ("fallback", reason)
    assert not calls


def test_four_bits_are_left_to_peft(folder, calls):
    ours, twin = make_pair(folder, FOUR)
    assert {(verdict, reason) for _, verdict, reason in plan(ours)} == {
        ("fallback", "there is no fast layer for peft.tuners.lora.bnb.Linear4bit")
    }
    assert torch.equal(logits(ours.eval()), logits(twin.eval()))
    assert not calls
    gradients = []
    for model in (ours, twin):
        model.train()(**make_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in parameters(model).items()})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())
    with pytest.raises(ValueError, match="expected one that was patched"):
        fastlora.unload(ours)
