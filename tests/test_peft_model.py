"""PeftModels on fastlora's ops, beside unpatched copies of the same models."""

import copy

import peft
import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model
from peft.tuners import lora
from peft_models import assert_same_logits, logits, make_pair, make_peft, patched
from test_against_peft import ADAPTERS, ALPHA, R, fill, flat, in_units_of, parameters, train
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora.integrations.peft import plan

pytestmark = pytest.mark.filterwarnings("ignore:(fan_in_fan_out|.*checkpointing. is deprecated|Already found a)")

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
NAMES = ["llama", "gpt2", "bert", "t5"]


def verdicts(model):
    return {(verdict, reason if verdict == "fallback" else "") for _, verdict, reason in plan(model)}


def run(kind, name, dtype):
    """What `train` gives under several adapters, by what it is."""
    runs = []
    for seed in range(ADAPTERS):
        model = make_peft(name, dtype, seed)
        model = model.double() if kind == "exact" else model if kind == "peft" else fastlora.patch(model)
        runs.append(train(model.train(), make_batch(tokens=16, batch=8)))
    return {key: [run[key] for run in runs] for key in runs[0]}


@BOTH_DTYPES
@pytest.mark.parametrize("name", NAMES)
def test_trains_as_accurately_as_peft(name, dtype):
    peft_s, ours, exact = (run(kind, name, dtype) for kind in ("peft", "fastlora", "exact"))
    for key in ("logits", "trained logits"):
        assert_as_accurate_as_eager(flat(ours[key]), flat(peft_s[key]), flat(exact[key]), key)
    gradients = [flat(in_units_of(exact["gradients"], run["gradients"])) for run in (ours, peft_s, exact)]
    assert_as_accurate_as_eager(*gradients, "gradients")
    # Of one mean PEFT may have the exact value by luck, so what it gets wrong per token is the measure.
    losses = [flat(run["trained losses"]).double() for run in (ours, peft_s, exact)]
    assert (losses[0].mean() - losses[2].mean()).abs() <= 2 * (losses[1] - losses[2]).square().mean().sqrt()


def second_adapter(model, **settings):
    settings = dict(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj"], init_lora_weights=False) | settings
    torch.manual_seed(9)
    model.add_adapter("second", peft.LoraConfig(**settings))


def use_second(model, **settings):
    second_adapter(model, **settings)
    model.set_adapter("second")


def several_active(model):
    second_adapter(model)
    model.base_model.set_adapter(["default", "second"])


def combine(model):
    second_adapter(model, target_modules=MODELS["llama"][1])
    model.add_weighted_adapter(["default", "second"], [0.3, 1.2], "both", combination_type="cat")
    model.set_adapter("both")


def delete(model):
    use_second(model, target_modules=MODELS["llama"][1])
    model.delete_adapter("default")


def merge_and_back(model):
    model.merge_adapter()
    model.unmerge_adapter()


def scale(model):
    for module in model.modules():
        if isinstance(module, lora.LoraLayer):
            module.set_scale("default", 3.0)


def disable(model):
    model.base_model.disable_adapter_layers()


def disable_and_enable(model):
    disable(model)
    model.base_model.enable_adapter_layers()


def switch_casting_off(model):
    for module in model.modules():
        if isinstance(module, lora.LoraLayer):
            module.cast_input_dtype_enabled = False


FAST, ADDED = ("fast", ""), ("fallback", "no adapter of the layer is active")


def left(reason):
    return "fallback", reason


# What PEFT does with a model, and what computes its layers then. `use_second` adds o_proj, which PEFT makes itself
# until the model is patched again, and leaves v_proj and down_proj without an active adapter.
OPERATIONS = {
    "nothing": (lambda model: None, {FAST}),
    "merge": (lambda model: model.merge_adapter(), {left("an adapter is merged")}),
    "merge-and-unmerge": (merge_and_back, {FAST}),
    "disable": (disable, {left("the adapters are disabled")}),
    "disable-and-enable": (disable_and_enable, {FAST}),
    "another-adapter": (use_second, {FAST, ADDED}),
    "another-rslora": (lambda model: use_second(model, use_rslora=True, rank_pattern={"q_proj": 2}), {FAST, ADDED}),
    "deleted-adapter": (delete, {FAST}),
    "several-active": (several_active, {FAST, left("several adapters are active")}),
    "combined": (combine, {FAST}),
    "scaled": (scale, {FAST}),
    "dora": (lambda model: use_second(model, use_dora=True), {left("DoraLinearVariant"), ADDED}),
    "lora-bias": (lambda model: use_second(model, lora_bias=True), {left("lora_bias"), ADDED}),
    "no-casting": (switch_casting_off, {left("the casting of inputs is switched off")}),
}


@pytest.mark.filterwarnings("ignore:(.lora_bias=True|.*has no bias)")
@pytest.mark.parametrize(("operate", "expected"), OPERATIONS.values(), ids=OPERATIONS.keys())
def test_follows_what_peft_does(operate, expected, calls):
    ours, twin = make_pair()
    count = len(patched(ours))
    for model in (ours, twin):
        operate(model)
    assert len(patched(ours)) == count
    assert verdicts(ours) == verdicts(twin) == expected
    assert_same_logits(ours, twin)
    fast = [name for name, verdict, _ in plan(ours) if verdict == "fast" and "o_proj" not in name]
    assert len(calls) == len(fast)
    fastlora.patch(ours)
    assert_same_logits(ours, twin)
    assert {name: p.shape for name, p in ours.state_dict().items()} == {
        name: p.shape for name, p in twin.state_dict().items()
    }


def test_disables_adapters_in_a_block(calls):
    ours, twin = make_pair()
    with ours.disable_adapter(), twin.disable_adapter():
        assert torch.equal(logits(ours), logits(twin))
    assert not calls
    assert_same_logits(ours, twin)


def test_chooses_an_adapter_per_row(calls):
    ours, twin = make_pair()
    for model in (ours, twin):
        second_adapter(model)
        model.eval()
    rows = dict(adapter_names=["second", "__base__"])
    assert torch.equal(logits(ours, **rows), logits(twin, **rows))
    assert not calls


@pytest.mark.parametrize("name", NAMES)
def test_merges_for_good_as_peft_does(name):
    ours, twin = (model.merge_and_unload() for model in make_pair(name))
    assert type(ours) is type(twin)
    assert [type(module) for module in ours.modules()] == [type(module) for module in twin.modules()]
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), twin.parameters(), strict=True))


def test_unload_gives_the_model_back(calls):
    ours, twin = make_pair()
    logits(ours)
    assert fastlora.unload(ours) is ours
    calls.clear()
    assert torch.equal(logits(ours), logits(twin))
    assert not calls
    for module, other in zip(ours.modules(), twin.modules(), strict=True):
        assert type(module) is type(other)
        assert module.__dict__.keys() == other.__dict__.keys()
    with pytest.raises(ValueError, match="model: expected one that was patched"):
        fastlora.unload(ours)


def test_patches_in_place_and_once():
    model = make_peft()
    keys = [module.__dict__.keys() for module in model.modules()]
    assert fastlora.patch(model) is model
    assert fastlora.patch(model) is model
    assert [module.__dict__.keys() for module in model.modules()] == keys
    assert all(isinstance(m, lora.Linear) and m.peft_class is lora.Linear for m in patched(model))
    assert len(patched(model)) == len(plan(model)) == 6
    assert all("Linear" in type(m).__name__ for m in patched(model)), "PEFT's all-linear looks for it"


def test_all_linear_finds_patched_layers():
    targets = []
    for model in make_pair():
        model.add_adapter("all", peft.LoraConfig(target_modules="all-linear"))
        targets.append({name for name, module in model.named_modules() if "all" in getattr(module, "lora_A", ())})
    assert targets[0] == targets[1]
    assert len(targets[0]) == 14


def test_patches_the_adapters_that_transformers_added(calls):
    model = make_model("llama")
    model.add_adapter(peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=MODELS["llama"][1]))
    fill(model, 3)
    twin = copy.deepcopy(model)
    assert_same_logits(fastlora.patch(model), twin)
    assert len(calls) == len(patched(model)) == 6


ARGUMENTS = {
    "r": ((8,), {}),
    "r, targets": ((8, ["q_proj"]), {}),
    "config": ((), dict(config=fastlora.LoraConfig(target_modules=["q_proj"]))),
    "alpha, quantize": ((), dict(alpha=3, quantize="int8")),
}


@pytest.mark.parametrize("names", ARGUMENTS)
def test_refuses_arguments_for_a_peft_model(names):
    model = make_peft()
    given, settings = ARGUMENTS[names]
    with pytest.raises(ValueError, match=f"^{names}: expected the model alone"):
        fastlora.patch(model, *given, **settings)
    assert not patched(model)
    with pytest.raises(ValueError, match="merge: expected the model alone"):
        fastlora.unload(model, merge=True)


def test_refuses_models_without_lora():
    other = peft.get_peft_model(make_model("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="model: expected LoRA layers of PEFT, found none in PeftModel"):
        fastlora.patch(other)
    with pytest.raises(ValueError, match="model: expected LoRA layers of PEFT"):
        plan(make_model("llama"))


def test_trainer_trains_it(tmp_path):
    ours, twin = make_pair()
    examples = [{key: value[0] for key, value in make_batch(seed=seed).items()} for seed in range(4)]
    for model in (ours, twin):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            save_strategy="steps", save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=examples)
        assert trainer.train().global_step == 2
        assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    before = parameters(make_peft())
    assert all(not torch.equal(value, before[name]) for name, value in parameters(ours).items())
    assert len(patched(ours)) == 6
    assert_same_logits(ours, twin)
