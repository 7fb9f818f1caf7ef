"""Models prepared for training: float32 norms and logits, 16-bit hidden states, and every bit back afterwards."""

import copy
import io

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager
from models import MODELS, make_batch, make_model
from test_bad_input import refused
from test_recipes import patched, saved_for_backward, train
from torch import nn

import fastlora
from fastlora import ops
from fastlora.layers import LoraLayer

# transformers renames its checkpointing from release to release.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

LAYERS = {"llama": "LlamaDecoderLayer", "gpt2": "GPT2Block", "t5": "T5Block"}
BY_MODEL = pytest.mark.parametrize("name", LAYERS)


# The head


def head_inputs(dtype, device, leading=(7,), rows=90):
    x, w = (torch.randn(shape, device=device).to(dtype) for shape in ((*leading, 33), (rows, 33)))
    return x, w, torch.randn(rows, device=device).to(dtype)


@pytest.mark.parametrize("block", [7, 8192])
@pytest.mark.parametrize("leading", [(1,), (37,), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_float32_is_as_accurate_as_float32(dtype, leading, block, device, monkeypatch):
    monkeypatch.setattr("fastlora.ops.float32.ROWS", block)
    x, w, bias = head_inputs(dtype, device, leading)
    d_y = torch.randn(*leading, 90, device=device)
    results = []
    for convert in (None, torch.float32, torch.float64):
        leaf = x.clone().requires_grad_()
        if convert is None:
            y = ops.linear_float32(leaf, w, bias)
        else:
            y = F.linear(leaf.to(convert), w.to(convert), bias.to(convert))
        (d_x,) = torch.autograd.grad(y, leaf, d_y.to(y.dtype))
        results.append((y, d_x))
    for actual, eager, exact in zip(*results, strict=True):
        assert_as_accurate_as_eager(actual, eager, exact.double())


def test_linear_float32_with_a_weight_that_trains():
    x, w, bias = head_inputs(torch.bfloat16, "cpu")
    leaves = [tensor.requires_grad_() for tensor in (x, w, bias)]
    expected = torch.autograd.grad(F.linear(x.float(), w.float(), bias.float()).square().sum(), leaves)
    for actual, exact in zip(
        torch.autograd.grad(ops.linear_float32(*leaves).square().sum(), leaves), expected, strict=True
    ):
        assert torch.equal(actual, exact)


def test_linear_float32_under_autocast_keeps_the_weight_alone():
    x, w, bias = head_inputs(torch.bfloat16, "cpu")
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        kept, y = saved_for_backward(lambda: ops.linear_float32(x, w, bias))
    assert torch.equal(y, ops.linear_float32(x, w, bias))
    assert [t.data_ptr() for t in kept] == [w.data_ptr()]


# Preparing a model


def trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def randomised(model):
    """Random A and B, the same for every model of one shape, and dropout masks that follow from the same seed."""
    torch.manual_seed(3)
    for parameter in trainable(model):
        parameter.data.normal_(std=0.1)
    return model


def is_norm(module):
    return "norm" in type(module).__name__.lower()


def watched(model):
    """What passes the norms, the layers and the head (module, input, output), gathered as the model runs."""
    seen = {"norm": [], "layer": [], "head": []}

    def watch(module, kind):
        module.register_forward_hook(lambda module, inputs, output: seen[kind].append((module, inputs[0], output)))

    for name, module in model.named_modules():
        if is_norm(module) or type(module).__name__ in LAYERS.values() or name == "lm_head":
            watch(module, "norm" if is_norm(module) else "head" if name == "lm_head" else "layer")
    return seen


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("order", ["prepare-patch", "patch-prepare"])
@BY_MODEL
def test_prepared_model_trains_with_half_hidden_states(name, order, checkpointing):
    if order == "prepare-patch":
        model = fastlora.prepare_for_training(make_model(name, torch.bfloat16), checkpointing)
        fastlora.patch(model, r=4, targets=MODELS[name][1])
    else:
        model = fastlora.prepare_for_training(patched(name, torch.bfloat16, quantize="int8"), checkpointing)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if "lora_" in n}
    seen = watched(model)
    losses = train(model, torch.optim.AdamW(trainable(model), lr=5e-3))
    assert losses[-1] < losses[0]
    assert all(seen.values())
    for module, x, y in seen["norm"]:
        assert (x.dtype, module.weight.dtype, y.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    for _, x, y in seen["layer"]:
        assert x.dtype == (y[0] if isinstance(y, tuple) else y).dtype == torch.bfloat16
    for module, x, y in seen["head"]:
        assert (x.dtype, module.weight.dtype, y.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@BY_MODEL
def test_norms_and_head_compute_in_float32(name):
    model = fastlora.prepare_for_training(patched(name, torch.bfloat16)).eval()
    stock = dict(make_model(name, torch.bfloat16).float().named_modules())
    names = {module: path for path, module in model.named_modules()}
    seen = watched(model)
    with torch.no_grad():
        model(**make_batch())
        for module, x, y in seen["norm"]:
            assert torch.equal(y, stock[names[module]](x).bfloat16())
        for module, x, y in seen["head"]:
            eager, exact = stock["lm_head"](x.float()), F.linear(x.double(), module.weight.double())
            assert_as_accurate_as_eager(y, eager, exact, "logits")


@BY_MODEL
def test_logits_come_closer_to_the_exact_ones(name):
    batch = make_batch(tokens=16, batch=8)
    model = patched(name, torch.bfloat16).eval()
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(**batch).logits
        plain = model(**batch).logits
        prepared = fastlora.prepare_for_training(model).eval()(**batch).logits
    assert prepared.dtype == torch.float32
    assert (prepared.double() - exact).square().mean() < (plain.double() - exact).square().mean()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_prepared_model_keeps_no_more_for_the_backward(name):
    """Where norms compute in float32 of their own, as RMS norms do; checkpointing would hide the difference."""
    kept = {}
    for prepared in (False, True):
        model = patched(name, torch.bfloat16).train()
        model.config.use_cache = False
        if prepared:
            fastlora.prepare_for_training(model, gradient_checkpointing=False)
        tensors, _ = saved_for_backward(lambda model=model: model(**make_batch()))
        kept[prepared] = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert 0 < kept[True] <= kept[False]


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # T5 adds up in another order when checkpointed
def test_checkpointing_changes_no_gradient(name):
    gradients = []
    for arguments in (dict(gradient_checkpointing=False), {}, dict(checkpointing_kwargs=dict(use_reentrant=True))):
        model = fastlora.prepare_for_training(patched(name, torch.bfloat16, dropout=0.2), **arguments).train()
        asked = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert asked == arguments.get("gradient_checkpointing", True)
        assert len(model.get_input_embeddings()._forward_hooks) == ("checkpointing_kwargs" in arguments)
        randomised(model)(**make_batch()).loss.backward()
        gradients.append([parameter.grad for parameter in trainable(model)])
    for plain, *others in zip(*gradients, strict=True):
        assert plain.any()
        assert all(torch.equal(plain, other) for other in others)


# Its own undoing of checkpointing leaves these on a model.
LEFT_BY_TRANSFORMERS = {"_gradient_checkpointing_func", "_require_grads_hooks"}


def state(model):
    """All that `undo_prepare` has to give back."""
    modules = {name: (type(m), m.training, *map(len, (m._forward_hooks, m._forward_pre_hooks)))
               for name, m in model.named_modules()}  # fmt: skip
    configs = {name: m.config.use_cache for name, m in model.named_modules() if hasattr(m, "config")}
    checkpointing = {
        n: m.gradient_checkpointing for n, m in model.named_modules() if hasattr(m, "gradient_checkpointing")
    }
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, configs, checkpointing, trains, set(model.__dict__) - LEFT_BY_TRANSFORMERS


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    ("through", "reentrant"),
    [(lambda model: model, False), (lambda model: model, True), (copy.deepcopy, False), (pickled, False)],
    ids=["itself", "reentrant", "deepcopy", "pickle"],
)
@BY_MODEL
def test_undo_gives_back_everything(name, reentrant, through):
    model = patched(name, torch.bfloat16)
    before, tensors = state(model), {n: t.clone() for n, t in model.state_dict().items()}
    fastlora.prepare_for_training(model, checkpointing_kwargs=dict(use_reentrant=reentrant))
    fastlora.prepare_for_training(model, checkpointing_kwargs=dict(use_reentrant=reentrant))  # anew, not on top
    assert not any(state(model)[1].values())
    model = through(model)
    assert fastlora.undo_prepare(model) is model
    assert state(model) == before
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == tensors[key].dtype
        assert torch.equal(tensor, tensors[key])
    with pytest.raises(ValueError, match="expected one that was prepared for training"):
        fastlora.undo_prepare(model)


def test_undo_leaves_checkpointing_on_where_it_was():
    model = make_model("llama", torch.bfloat16)
    model.gradient_checkpointing_enable()
    before = state(model)
    fastlora.undo_prepare(fastlora.prepare_for_training(model))
    assert state(model) == before


def test_nothing_to_widen_in_float32():
    model = patched()
    before = state(model)
    fastlora.prepare_for_training(model, gradient_checkpointing=False)
    assert state(model)[0] == before[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_tied_and_hooked_heads():
    model = make_model("gpt2", torch.bfloat16)
    accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.ModelHook())
    assert model.lm_head.weight is model.transformer.wte.weight
    fastlora.prepare_for_training(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(**make_batch()).logits.dtype == torch.float32
    assert fastlora.undo_prepare(model)(**make_batch()).logits.dtype == torch.bfloat16


def test_a_head_with_an_adapter_stays():
    model = make_model("llama", torch.bfloat16)
    fastlora.patch(model, targets=["lm_head"], allow_output_head=True)
    fastlora.prepare_for_training(model)
    assert isinstance(model.lm_head, LoraLayer)
    assert model(**make_batch()).logits.dtype == torch.bfloat16


def logits_and_gradients(model, forward):
    logits = forward(input_ids=make_batch()["input_ids"]).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    F.cross_entropy(wide.flatten(0, 1), make_batch()["labels"].flatten()).backward()
    return logits.detach(), [parameter.grad for parameter in trainable(model)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prepared_model_compiles_without_a_graph_break(name):
    models = [randomised(patched(name, torch.bfloat16)) for _ in range(3)]
    exact_logits, exact = logits_and_gradients(models[0].double(), models[0])
    for model in models[1:]:
        fastlora.prepare_for_training(model, gradient_checkpointing=False).train()
    eager_logits, eager = logits_and_gradients(models[1], models[1])
    torch.compiler.reset()
    compiled = torch.compile(models[2], backend="aot_eager", fullgraph=True)
    logits, gradients = logits_and_gradients(models[2], compiled)
    torch.compiler.reset()
    assert logits.dtype == torch.float32
    assert_as_accurate_as_eager(logits, eager_logits, exact_logits, "logits")
    scales = [gradient.abs().max() for gradient in exact]
    units = [[g / s.to(g.dtype) for g, s in zip(gs, scales, strict=True)] for gs in (gradients, eager, exact)]
    assert_as_accurate_as_eager(*(torch.cat([g.flatten() for g in gs]) for gs in units), "gradients")


def test_refuses():
    plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).bfloat16()
    refused(plain, "expected a model that supports it, found Sequential", lambda: fastlora.prepare_for_training(plain))
    fastlora.prepare_for_training(plain, gradient_checkpointing=False)
    assert plain(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    model = make_model("llama", torch.bfloat16)
    call = lambda: fastlora.prepare_for_training(model, False, dict(use_reentrant=True))  # noqa: E731
    refused(model, "checkpointing_kwargs: expected with gradient_checkpointing", call)
