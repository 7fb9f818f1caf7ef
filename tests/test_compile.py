"""The ops under opcheck and autograd, and patched models under torch.compile and gradient checkpointing."""

import contextlib
import shutil

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, to_float64
from inputs import DTYPES, backward_inputs, linear_inputs
from models import VOCABULARY, make_batch, make_model
from torch import nn
from torch.library import opcheck

import fastlora
from fastlora import ops
from fastlora_kernels import reference

SHAPE = (5, 12, 9, 3)
TARGETS = ["q_proj", "v_proj", "down_proj"]
ROOMS = ["reference", "gpu"] if torch.cuda.is_available() else ["reference", "cpu", "gpu"]
INPUTS = {
    "dense": dict(),
    "int8": dict(int8=True),
    "dropout": dict(p=0.25),
    "int8-dropout": dict(int8=True, p=0.25),
    "no-bias": dict(bias=False),
    "int8-no-bias": dict(int8=True, bias=False),
    "frozen": dict(adapter=False),
    "int8-frozen": dict(int8=True, adapter=False),
}
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "cc"))), reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _one_thread():
    """On models this small a second thread costs more than it gains, and on a busy machine a hundred times more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def with_gradients(inputs):
    """The inputs with x, a and b as leaves that need gradients."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "a", "b") if inputs[name] is not None}
    return inputs | leaves, leaves


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", INPUTS.values(), ids=INPUTS.keys())
def test_opcheck_lora_linear(options, dtype, room, device):
    inputs, _ = with_gradients(linear_inputs(SHAPE, dtype, device, **options))
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear, tuple(inputs.values()))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(int8=True), dict(p=0.25), dict(int8=True, adapter=False)], ids=str)
def test_opcheck_lora_linear_backward(options, dtype, room, device):
    inputs = backward_inputs(SHAPE, dtype, device, **options)
    order = ("d_y", "x", "s", "w", "w_scale", "a", "b", "scale", "p", "seed", "needs_x", "needs_a", "needs_b")
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear_backward, tuple(inputs[name] for name in order))
        inputs |= dict(x=None, needs_a=False, needs_b=inputs["needs_b"])
        opcheck(torch.ops.fastlora.lora_linear_backward, tuple(inputs[name] for name in order))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_weights(dtype, room, device):
    inputs = linear_inputs(SHAPE, dtype, device)
    q, w_scale = reference.quantize_rows(inputs["w"])
    adapter = inputs["a"], inputs["b"], 0.5
    with ops.using(room):
        opcheck(torch.ops.fastlora.quantize_rows, (inputs["w"],))
        opcheck(torch.ops.fastlora.quantize_rows, (inputs["w"].T,))
        opcheck(torch.ops.fastlora.merge_rows, (inputs["w"], None, *adapter))
        opcheck(torch.ops.fastlora.merge_rows, (inputs["w"].T.contiguous().T, None, *adapter))
        opcheck(torch.ops.fastlora.merge_rows, (q, w_scale, *adapter))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck_dropout_mask(p, room, device):
    with ops.using(room):
        opcheck(torch.ops.fastlora.dropout_mask, (torch.tensor([5], device=device), 5, 9, p))


def gradients(function, inputs, d_y):
    inputs, leaves = with_gradients(inputs)
    return torch.autograd.grad(function(**inputs), list(leaves.values()), d_y.to(inputs["x"].dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", INPUTS.values(), ids=INPUTS.keys())
def test_gradients_are_those_of_autograd(options, dtype, device):
    """Through the reference's forward, with the same mask."""
    inputs = linear_inputs((37, 100, 63, 5), dtype, device, **options)
    d_y = torch.randn(37, 63, device=device)
    d_y = d_y.to(dtype).double()  # the same in every dtype below
    differentiable = lambda **inputs: reference.lora_linear(**inputs)[0]  # noqa: E731
    actual, eager = gradients(ops.lora_linear, inputs, d_y), gradients(differentiable, inputs, d_y)
    exact = gradients(differentiable, to_float64(inputs), d_y)
    for name, *values in zip(("d_x", "d_a", "d_b"), actual, eager, exact, strict=False):
        assert_as_accurate_as_eager(*values, name)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_gradients_are_finite_differences(int8, p, device):
    inputs = to_float64(linear_inputs(SHAPE, torch.float32, device, int8=int8, p=p))
    inputs, leaves = with_gradients(inputs)
    function = lambda *values: ops.lora_linear(**inputs | dict(zip(leaves, values, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def make_patched(p=0.0, quantize=None, dtype=torch.float32):
    model = fastlora.patch(make_model("llama", dtype), r=4, targets=TARGETS, dropout=p, quantize=quantize)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    return model.train()


def step(model, batch, call=None, seed=11):
    """Logits and adapter gradients of a training step, whose dropout the seed decides."""
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = (model if call is None else call)(**batch)
    outputs.loss.backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert results
    assert all(".lora_" in name for name in results)
    return results | {"logits": outputs.logits.detach()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_compiles_without_a_graph_break(quantize, p):
    model = make_patched(p, quantize)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(step(model, make_batch(), compiled), step(model, make_batch()))


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiles_once_for_every_length(p):
    model = make_patched(p, "int8")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    step(model, make_batch(), compiled)
    longer = make_batch(tokens=17, batch=3)
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = step(model, longer, compiled)
    assert_equal(actual, step(model, longer))


def test_compiled_model_follows_its_adapters():
    """A compiled graph must not outlive the adapter, the mode or the scaling that it was made for."""
    model, batch = make_patched(0.2), {"input_ids": make_batch()["input_ids"]}
    fastlora.patch(model, r=2, targets=["up_proj"], adapter="other")
    nn.init.normal_(model.model.layers[0].mlp.up_proj.lora_B["other"])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check(context=contextlib.nullcontext):
        results = []
        for call in (compiled, model):
            torch.manual_seed(3)
            with context(), torch.no_grad():
                results.append(call(**batch).logits)
        assert torch.equal(*results)
        return results[0]

    seen = [check()]
    fastlora.set_adapter(model, "default")
    seen += [check(), check(lambda: fastlora.disabled(model))]
    model.eval()
    seen.append(check())
    model.model.layers[0].self_attn.q_proj.scaling["default"] = 5.0
    seen.append(check())
    fastlora.merge(model)
    merged = check()
    assert torch.allclose(merged, seen[-1], atol=1e-5)
    fastlora.unmerge(model)
    assert torch.equal(check(), seen[-1])
    assert len({logits.sum().item() for logits in seen}) == len(seen)


@needs_compiler
@pytest.mark.parametrize(("quantize", "p"), [("int8", 0.2)])
def test_inductor_is_as_accurate_as_eager(quantize, p):
    model, batch = make_patched(p, quantize), make_batch()
    eager = step(model, batch)
    # Inductor has a random generator of its own; for the same masks it has to use torch's.
    with torch._inductor.config.patch(fallback_random=True):
        actual = step(model, batch, torch.compile(model, fullgraph=True))
    with ops.using("reference"):
        exact = step(make_patched(p, quantize).double(), batch)
    for name, value in actual.items():
        assert_as_accurate_as_eager(value, eager[name], exact[name], name)


@needs_compiler
def test_inductor_drops_the_same_elements_in_the_backward():
    """With its own random generator: the backward must not draw another seed."""
    layer = nn.Linear(VOCABULARY, VOCABULARY, bias=False)
    nn.init.zeros_(layer.weight)
    fastlora.patch(layer_in := nn.Sequential(layer), r=VOCABULARY, targets=["0"], dropout=0.5)
    for parameter in layer_in.parameters():
        nn.init.eye_(parameter) if parameter.requires_grad else None
    x = torch.ones(16, VOCABULARY, requires_grad=True)
    y = torch.compile(layer_in.train(), fullgraph=True)(x)
    y.sum().backward()
    assert 0 < (y == 0).sum() < y.numel()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_changes_no_bit(reentrant, quantize, dtype):
    model = make_patched(0.2, quantize, dtype)
    model.enable_input_require_grads()  # reentrant checkpoints need an input with a gradient
    expected = step(model, make_batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert_equal(step(model, make_batch()), expected)


def test_compiled_checkpointing_changes_no_bit():
    model = make_patched(0.2, "int8")
    expected = step(model, make_batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(step(model, make_batch(), compiled), expected)
