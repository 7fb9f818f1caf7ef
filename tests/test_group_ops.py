"""`lora_linear_group` in every room against the reference in float64, and as an operator."""

import pytest
import torch
from accuracy import compare, to_float64
from inputs import linear_inputs
from torch.library import opcheck

from fastlora import ops
from fastlora_kernels import reference

NAMES = {"ws": "w", "w_scales": "w_scale", "biases": "bias", "a_s": "a", "b_s": "b", "scales": "scale", "ps": "p"}
FEATURES = 100

# M tokens, and N, R and p of every layer.
GROUPS = {
    "one-token": (1, [(40, 8, 0.25), (24, 8, 0.25)]),
    "no-dropout": (70, [(63, 5, 0.0), (40, 5, 0.0), (33, 9, 0.0)]),
    "dropout": (70, [(63, 5, 0.25), (40, 5, 0.25), (33, 5, 0.25)]),
    "other-ranks": (70, [(63, 3, 0.25), (40, 17, 0.25)]),
    "other-dropouts": (70, [(63, 5, 0.25), (40, 5, 0.0)]),
}


def group_inputs(group, dtype, device, **options):
    """Arguments of `lora_linear_group`."""
    M, layers = group
    each = [linear_inputs((M, FEATURES, N, R), dtype, device, p=p, **options) for N, R, p in layers]
    seeds = [torch.tensor([11 + i], device=device) if p > 0 else None for i, (_, _, p) in enumerate(layers)]
    lists = {name: [layer[own] for layer in each] for name, own in NAMES.items()}
    return dict(x=each[0]["x"], **lists, seeds=seeds)


def backward_inputs(group, dtype, device, **options):
    """Arguments of `lora_linear_group_backward`."""
    inputs = group_inputs(group, dtype, device, **options)
    ys, ss = reference.lora_linear_group(**inputs)
    del inputs["biases"]
    needed = [True] * len(ys)
    d_ys = [torch.randn_like(y) for y in ys]
    return dict(d_ys=d_ys, ss=ss, needs_x=True, needs_a=needed, needs_b=needed, **inputs)


def flat(function):
    """The function with its lists of results in one."""

    def call(**inputs):
        results = function(**inputs)
        return [t for result in results for t in ([result] if torch.is_tensor(result) else result)]

    return call


def check(room, name, inputs):
    compare(flat(getattr(room, name)), flat(getattr(reference, name)), inputs)


@pytest.mark.parametrize(
    ("dtype", "int8"), [(torch.float32, False), (torch.float16, True), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
def test_matches_reference(room, where, group, dtype, int8):
    check(room, "lora_linear_group", group_inputs(group, dtype, where, int8=int8))
    check(room, "lora_linear_group_backward", backward_inputs(group, dtype, where, int8=int8))


def test_layer_without_a_gradient(room, where):
    inputs = backward_inputs(GROUPS["dropout"], torch.float32, where)
    inputs["d_ys"][0] = None
    check(room, "lora_linear_group_backward", inputs)


@pytest.mark.parametrize("needed", ["x", "a", "b"])
def test_only_needed_gradients(room, where, needed):
    inputs = backward_inputs(GROUPS["other-ranks"], torch.float32, where, int8=True)
    everything = flat(room.lora_linear_group_backward)(**inputs)
    switches = dict(needs_x=needed == "x", needs_a=[needed == "a"] * 2, needs_b=[needed == "b", False])
    inputs["x"] = inputs["x"] if needed == "a" else None
    some = flat(room.lora_linear_group_backward)(**inputs | switches)
    wanted = [switches["needs_x"], *switches["needs_a"], *switches["needs_b"]]
    for want, one, all_ in zip(wanted, some, everything, strict=True):
        assert torch.equal(one, all_) if want else one.numel() == 0


def test_same_bits_every_time(room, where):
    inputs = backward_inputs(GROUPS["dropout"], torch.bfloat16, where)
    first, second = (flat(room.lora_linear_group_backward)(**inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_no_tokens(room, where):
    ys, ss = room.lora_linear_group(**group_inputs((0, GROUPS["dropout"][1]), torch.float32, where))
    assert [y.shape for y in ys] == [(0, 63), (0, 40), (0, 33)]
    assert [s.shape for s in ss] == [(0, 5)] * 3


def leaves_of(inputs):
    """Inputs whose x, a_s and b_s need gradients, and these."""
    x = inputs["x"].clone().requires_grad_()
    a_s, b_s = ([t.clone().requires_grad_() for t in inputs[name]] for name in ("a_s", "b_s"))
    return inputs | dict(x=x, a_s=a_s, b_s=b_s), [x, *a_s, *b_s]


@pytest.mark.parametrize("threshold", [None, 2.0])
@pytest.mark.parametrize("room", ["reference", "cpu", "gpu"])
def test_opcheck(room, device, threshold):
    if room == "cpu":
        device = "cpu"
    inputs, _ = leaves_of(group_inputs(GROUPS["other-dropouts"], torch.bfloat16, device, int8=True))
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear_group, (*inputs.values(), threshold))


def test_gradients_are_finite_differences(device):
    group = 3, [(5, 2, 0.25), (4, 3, 0.0)]
    inputs, leaves = leaves_of(to_float64(group_inputs(group, torch.float32, device, int8=True)))

    def function(x, *rest):
        return tuple(ops.lora_linear_group(**inputs | dict(x=x, a_s=rest[:2], b_s=rest[2:])))

    assert torch.autograd.gradcheck(function, tuple(leaves))


def single_ops(inputs):
    lists = zip(*(inputs[name] for name in [*NAMES, "seeds"]), strict=True)
    return [ops.lora_linear(inputs["x"], *layer) for layer in lists]


def saved_bytes(function):
    """Bytes of the memory that autograd keeps, each counted once."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    ):
        outputs = function()
    return sum(kept.values()), outputs


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())
def test_keeps_no_more_than_single_ops(group):
    inputs, _ = leaves_of(group_inputs(group, torch.float32, "cpu"))
    alone, expected = saved_bytes(lambda: single_ops(inputs))
    together, outputs = saved_bytes(lambda: ops.lora_linear_group(**inputs))
    assert together == alone
    assert all(torch.equal(y, other) for y, other in zip(outputs, expected, strict=True))


def test_output_that_nobody_used():
    inputs, leaves = leaves_of(to_float64(group_inputs(GROUPS["dropout"], torch.float32, "cpu")))
    gradients = [
        torch.autograd.grad(function(inputs)[1].square().sum(), leaves, allow_unused=True)
        for function in (lambda inputs: ops.lora_linear_group(**inputs), single_ops)
    ]
    for together, alone in zip(*gradients, strict=True):
        assert (together is None) == (alone is None)
        assert together is None or torch.equal(together, alone)


def test_refuses_what_does_not_fit():
    inputs = group_inputs(GROUPS["dropout"], torch.float32, "cpu")
    with pytest.raises(ValueError, match="x: expected 100 features"):
        ops.lora_linear_group(**inputs | dict(x=torch.randn(2, 7)))
    with pytest.raises(ValueError, match="seed: expected one int64"):
        ops.lora_linear_group(**inputs | dict(seeds=[None] * 3))
