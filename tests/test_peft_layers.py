"""Calls of PEFT's LoRA layers on fastlora's ops: when they run there, and what they compute."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accuracy import assert_as_accurate_as_eager
from test_against_peft import fill, wrap
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.integrations.peft import plan
from fastlora.integrations.peft_layers import obstacle

# transformers renames its checkpointing from release to release; the old names work in all of them.
pytestmark = pytest.mark.filterwarnings("ignore:(.*gradient_checkpointing.* is deprecated|fan_in_fan_out)")

K, N, R = 24, 20, 3


def make_layer(base=None, **settings):
    """An unpatched LoRA layer of PEFT, whose adapter does something."""
    model = nn.Sequential(nn.Linear(K, N) if base is None else base)
    return fill(wrap(model, **dict(r=R, lora_alpha=5, target_modules=["0"]) | settings), 1).base_model.model[0]


def pair_of(twin):
    """The layer patched, and itself."""
    return fastlora.patch(nn.Sequential(copy.deepcopy(twin)))[0], twin


def call(layer, x):
    """Output and gradients of x and of all that trains."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    torch.manual_seed(4)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], torch.randn_like(y))]


def assert_same(ours, twin, x):
    """Outputs and gradients as accurate as PEFT's; `x` in the dtype that the layer takes."""
    exact = call(copy.deepcopy(twin).double(), x.double())
    for index, results in enumerate(zip(call(ours, x), call(twin, x), exact, strict=True)):
        assert_as_accurate_as_eager(*results, f"result {index}")


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class FalconLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


FAST = {
    "linear": make_layer,
    "conv1d": lambda: make_layer(Conv1D(N, K), fan_in_fan_out=True),
    "no-bias": lambda: make_layer(nn.Linear(K, N, bias=False)),
    "equivalent-class": lambda: make_layer(FalconLinear(K, N)),
    "trained-bias": lambda: make_layer(bias="lora_only"),
    "rslora": lambda: make_layer(use_rslora=True),
    "float16": lambda: make_layer(nn.Linear(K, N).half()),
    "bfloat16": lambda: make_layer(nn.Linear(K, N).bfloat16()),
    "bfloat16-adapter": lambda: make_layer(nn.Linear(K, N).bfloat16()).bfloat16(),
    "no-dropout-in-evaluation": lambda: make_layer(lora_dropout=0.5).eval(),
}


@pytest.mark.parametrize("shape", [(K,), (1, K), (37, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("make", FAST.values(), ids=FAST.keys())
def test_computes_what_peft_computes(make, shape, calls):
    ours, twin = pair_of(make())
    assert_same(ours, twin, torch.randn(shape).to(twin.base_layer.weight.dtype))
    assert len(calls) == 1
    assert [verdict for _, verdict, _ in plan(nn.Sequential(ours))] == ["fast"]


def test_takes_no_tokens(calls):
    ours, twin = pair_of(make_layer())
    for actual, expected in zip(call(ours, torch.empty(0, K)), call(twin, torch.empty(0, K)), strict=True):
        assert torch.equal(actual, expected)
    assert len(calls) == 1


def with_base(change):
    """A layer whose base is changed after PEFT wrapped it."""
    layer = make_layer()
    change(layer.base_layer)
    return layer


def with_parts(change):
    """A layer whose A and B are changed after PEFT made them."""
    layer = make_layer()
    layer.lora_A["default"], layer.lora_B["default"] = change(layer.lora_A["default"]), change(layer.lora_B["default"])
    return layer


def with_dropout(dropout):
    layer = make_layer()
    layer.lora_dropout["default"] = dropout
    return layer


def hook(module):
    module.register_forward_hook(lambda module, inputs, output: output * 3)
    return module


def parametrize(module):
    torch.nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())
    return module


def replace_forward(module):
    module.forward = lambda x: torch.ones_like(type(module).forward(module, x))


def offload(module):
    """The weight elsewhere, as accelerate keeps it between the calls of a model that does not fit."""
    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True))


class Tagged(torch.Tensor):
    """A subclass that no op knows."""


def with_subclass():
    layer = make_layer()
    weight = layer.lora_A["default"].weight.data.as_subclass(Tagged)
    layer.lora_A["default"].weight = nn.Parameter(weight)
    return layer


SLOW = {
    "subclass-of-linear": (lambda: make_layer(Doubled(K, N)), "a base layer of class Doubled"),
    "trained-base": (lambda: with_base(lambda base: base.weight.requires_grad_()), "the base layer's weight trains"),
    "hooked-base": (lambda: with_base(hook), "hooks on the base layer"),
    "parametrised-base": (lambda: with_base(parametrize), "a base layer of class ParametrizedLinear"),
    "replaced-forward": (lambda: with_base(replace_forward), "hooks on the base layer"),
    "offloaded-base": (lambda: with_base(offload), "hooks on the base layer"),
    "hooked-adapter": (lambda: with_parts(hook), "hooks on lora_A, lora_B or lora_dropout"),
    "parametrised-adapter": (
        lambda: with_parts(parametrize), "lora_A and lora_B of class ParametrizedLinear and ParametrizedLinear"
    ),
    "all-dropped": (lambda: with_dropout(nn.Dropout(1.0)), "a dropout layer Dropout(p=1.0, inplace=False)"),
    "another-dropout": (lambda: with_dropout(nn.Hardtanh(-1e9, 1e9)), "a dropout layer Hardtanh("),
    "tensor-subclass": (with_subclass, "lora_A is of class Tagged"),
    "embedding": (
        lambda: make_layer(nn.Embedding(K, N)), "there is no fast layer for peft.tuners.lora.layer.Embedding"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), SLOW.values(), ids=SLOW.keys())
def test_leaves_to_peft_what_is_not_plain_lora(make, reason, calls):
    torch.manual_seed(0)
    twin = make()
    torch.manual_seed(0)
    ours = fastlora.patch(nn.Sequential(make()))[0]
    [(_, verdict, found)] = plan(nn.Sequential(ours))
    assert verdict == "fallback"
    assert found.startswith(reason)
    x = torch.arange(K).reshape(2, -1) if isinstance(twin.base_layer, nn.Embedding) else torch.randn(5, K)
    assert torch.equal(ours(x), twin(x))
    assert not calls


def test_does_not_pass_over_hooks_on_all_modules(calls):
    ours, _ = pair_of(make_layer())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: seen.append(type(module)))
    try:
        ours(torch.randn(2, K))
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3
    assert not calls


def test_takes_layers_with_hooks_around_them(calls):
    """Those that accelerate puts on a model for several devices, and those of the user on the whole layer."""
    twin = make_layer()
    for module in (twin, twin.base_layer):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    twin.register_forward_hook(lambda module, inputs, output: output * 3)
    x = torch.randn(2, K)
    expected, exact = twin(x), copy.deepcopy(twin).double()(x.double())
    ours = fastlora.patch(nn.Sequential(twin))[0]
    assert_as_accurate_as_eager(ours(x), expected, exact)
    assert len(calls) == 1
    fastlora.unload(nn.Sequential(ours))
    assert torch.equal(ours(x), expected)
    assert len(calls) == 1


def test_an_input_of_another_dtype_is_the_error_of_peft():
    messages = []
    for layer in pair_of(make_layer()):
        with pytest.raises(RuntimeError, match="dtype") as error:
            layer(torch.randn(2, K, dtype=torch.float64))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


MOVED = {
    "device": (dict(device="meta"), "tensors on several devices"),
    "dtype": (dict(dtype=torch.float8_e4m3fn), "lora_A is in torch.float8_e4m3fn"),
}


def outcome(layer, x):
    """The error of a call, or the kind of its result."""
    try:
        y = layer(x)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)
    return y.device, y.dtype, y.shape


@pytest.mark.parametrize(("where", "reason"), MOVED.values(), ids=MOVED.keys())
def test_an_adapter_that_no_op_takes_is_for_peft(where, reason, calls):
    ours, twin = pair_of(make_layer())
    x = torch.randn(2, K)
    for layer in (ours, twin):
        layer.lora_A["default"].to(**where)
    assert obstacle(type(ours), ours, x) == reason
    assert outcome(ours, x) == outcome(twin, x)
    assert not calls


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [nn.Linear(K, N), Conv1D(N, K)], ids=["linear", "conv1d"])
def test_autocast_gives_the_dtype_of_peft(base, dtype, x_dtype, calls):
    ours, twin = pair_of(make_layer(copy.deepcopy(base).to(dtype)))
    x = torch.randn(5, K).to(x_dtype)
    exact = call(copy.deepcopy(twin).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        results = call(ours, x), call(twin, x)
    for index, (actual, eager, reference) in enumerate(zip(*results, exact, strict=True)):
        assert_as_accurate_as_eager(actual, eager, reference, f"result {index}")
    assert len(calls) == (x_dtype != torch.float16), "two 16-bit dtypes"


def test_per_sample_gradients_are_those_of_peft(calls):
    """torch.func cannot see through the ops' autograd."""
    results, x = [], torch.randn(4, K)
    for layer in pair_of(make_layer()):
        weights = {name: p.detach() for name, p in layer.named_parameters() if ".default" in name}
        loss = lambda w, x, layer=layer: torch.func.functional_call(layer, w, (x,)).square().sum()  # noqa: E731
        results.append(torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    assert not calls
