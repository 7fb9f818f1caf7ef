"""The ops under opcheck and autograd, and patched models under torch.compile and gradient checkpointing."""

import contextlib
import copy
import shutil

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, to_float64
from compilers import assert_all_as_accurate
from inputs import DTYPES, backward_inputs, linear_inputs
from models import make_batch, make_model
from torch import nn
from torch.library import opcheck

import fastlora
from fastlora import ops
from fastlora.layers import dissolve_groups
from fastlora_kernels import reference

# transformers renames its checkpointing from release to release; the old names work in all of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

SHAPE = (5, 12, 9, 3)
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
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
def _forget_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def with_gradients(inputs):
    """The inputs with x, a and b as leaves that need gradients."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "a", "b") if inputs[name] is not None}
    return inputs | leaves, leaves


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", INPUTS.values(), ids=INPUTS.keys())
def test_opcheck_lora_linear(options, dtype, room, device):
    inputs, _ = with_gradients(linear_inputs(SHAPE, dtype, device, **options))
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear, tuple(inputs.values()))


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(int8=True), dict(p=0.25), dict(int8=True, adapter=False)], ids=str)
def test_opcheck_lora_linear_backward(options, dtype, room, device):
    inputs = backward_inputs(SHAPE, dtype, device, **options)
    order = ("d_y", "x", "s", "w", "w_scale", "a", "b", "scale", "p", "seed", "needs_x", "needs_a", "needs_b")
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear_backward, tuple(inputs[name] for name in order))
        inputs |= dict(x=None, needs_a=False, needs_b=inputs["needs_b"])
        opcheck(torch.ops.fastlora.lora_linear_backward, tuple(inputs[name] for name in order))


def column_major(tensor):
    return tensor.T.contiguous().T


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, column_major], ids=["row-major", "column-major"])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_weights(dtype, room, layout, device):
    inputs = linear_inputs(SHAPE, dtype, device)
    (q, w_scale), w = reference.quantize_rows(inputs["w"]), layout(inputs["w"])
    with ops.using(room):
        opcheck(torch.ops.fastlora.quantize_rows, (w,))
        opcheck(torch.ops.fastlora.merge_rows, (w, None, inputs["a"], inputs["b"], 0.5))
        opcheck(torch.ops.fastlora.merge_rows, (layout(q), w_scale, inputs["a"], inputs["b"], 0.5))


@pytest.mark.parametrize("room", ROOMS)
def test_opcheck_any_strides(room, device):
    inputs = linear_inputs(SHAPE, torch.float32, device, p=0.25)
    inputs |= {name: column_major(inputs[name]) for name in ("x", "w", "a", "b")}
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear, tuple(with_gradients(inputs)[0].values()))


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


def ungrouped(model):
    """A copy whose layers compute one by one, as they do in compiled code: sums over them are of another order."""
    alone = copy.deepcopy(model)
    dissolve_groups(alone)
    return alone


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_compiles_without_a_graph_break(quantize, p):
    model = make_patched(p, quantize)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(step(model, make_batch(), compiled), step(ungrouped(model), make_batch()))


def test_compiles_under_autocast():
    model = make_patched(0.2, "int8")
    exact = step(ungrouped(model).double(), make_batch())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert_all_as_accurate(step(model, make_batch(), compiled), step(ungrouped(model), make_batch()), exact)


def test_compiles_once_for_every_length():
    model = make_patched(0.2, "int8")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    step(model, make_batch(), compiled)
    longer = make_batch(tokens=17, batch=3)
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = step(model, longer, compiled)
    assert_equal(actual, step(ungrouped(model), longer))


def test_compiled_model_follows_its_adapters():
    """A compiled graph must not outlive the adapter, the mode or the scaling that it was made for."""
    model = nn.Sequential(nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 8))
    for name, target in (("first", "0"), ("second", "2")):
        fastlora.patch(model.train(), r=2, targets=[target], dropout=0.2, adapter=name)
        nn.init.normal_(model.get_submodule(target).lora_B[name])
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), torch.randn(6, 12)

    def check(context=contextlib.nullcontext):
        results = []
        for call in (compiled, model):
            torch.manual_seed(3)
            with context(), torch.no_grad():
                results.append(call(x))
        assert torch.equal(*results)
        return results[0]

    seen = [check()]
    fastlora.set_adapter(model, "first")
    seen += [check(), check(lambda: fastlora.disabled(model))]
    model.eval()
    seen.append(check())
    model[0].scaling["first"] = 5.0
    seen.append(check())
    fastlora.merge(model)
    check()
    fastlora.unmerge(model)
    assert torch.equal(check(), seen[-1])
    assert len({y.sum().item() for y in seen}) == len(seen)


@needs_compiler
def test_inductor_is_as_accurate_as_eager():
    model, batch = make_patched(0.2, "int8"), make_batch()
    eager = step(model, batch)
    # Inductor has a random generator of its own; for the same masks it has to use torch's.
    with torch._inductor.config.patch(fallback_random=True):
        actual = step(model, batch, torch.compile(model, fullgraph=True))
    with ops.using("reference"):
        exact = step(make_patched(0.2, "int8").double(), batch)
    for name, value in actual.items():
        assert_as_accurate_as_eager(value, eager[name], exact[name], name)


@needs_compiler
def test_inductor_drops_the_same_elements_in_the_backward():
    """With its own random generator: the backward must not draw another seed."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.zeros_(model[0].weight)
    fastlora.patch(model, r=64, targets=["0"], dropout=0.5).train()
    nn.init.eye_(model[0].lora_A["default"])
    nn.init.eye_(model[0].lora_B["default"])
    x = torch.ones(16, 64, requires_grad=True)
    y = torch.compile(model, fullgraph=True)(x)
    y.sum().backward()
    assert 0 < (y == 0).sum() < y.numel()
    assert torch.equal(x.grad, y.detach())


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_changes_no_bit(reentrant, quantize, dtype):
    model = make_patched(0.2, quantize, dtype)
    expected = step(model, make_batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    assert_equal(step(model, make_batch()), expected)


def test_compiled_checkpointing_changes_no_bit():
    model = make_patched(0.2, "int8")
    model.config.use_cache = False  # else transformers logs that it is, which breaks the graph
    expected = step(ungrouped(model), make_batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()  # a hook for reentrant checkpoints, which dynamo refuses
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal(step(model, make_batch(), compiled), expected)
