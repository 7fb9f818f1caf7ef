"""`lora_linear` and its backward in every room against the reference in float64."""

import pytest
import torch
from accuracy import compare
from inputs import DTYPES, SHAPES, backward_inputs, linear_inputs

from fastlora_kernels import gpu, reference

PASSES = {"forward": ("lora_linear", linear_inputs), "backward": ("lora_linear_backward", backward_inputs)}


def check(room, which, where, shape, dtype, **options):
    name, make = PASSES[which]
    few = shape[0] * shape[1] * shape[2] < 100
    draws = [make(shape, dtype, where, **options) for _ in range(64 if few else 1)]
    compare(getattr(room, name), getattr(reference, name), *draws)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_matches_reference(room, where, which, shape, dtype, int8, p):
    check(room, which, where, shape, dtype, int8=int8, p=p)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("rank", [1, 2, 15, 16, 17, 33, 64, 100, 129, 256])
def test_every_rank(room, where, which, rank):
    check(room, which, where, (20, 48, 40, rank), torch.bfloat16, int8=True, p=0.1)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_adapter_dtypes(room, where, which, adapter_dtype):
    check(room, which, where, (20, 48, 40, 8), torch.bfloat16, adapter_dtype=adapter_dtype)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_layer_alone(room, where, which, dtype, int8):
    check(room, which, where, (37, 100, 63, 1), dtype, int8=int8, adapter=False)


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_without_bias(room, where, int8):
    check(room, "forward", where, (37, 100, 63, 5), torch.bfloat16, int8=int8, bias=False)


def transposed(tensor):
    """The same values in column-major memory."""
    return tensor.T.contiguous().T


def strided(tensor):
    """The same values as every second element of a larger tensor."""
    larger = tensor.repeat_interleave(2, dim=1)
    return larger[:, ::2]


@pytest.mark.parametrize("layout", [transposed, strided])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_any_strides(room, where, which, int8, layout):
    name, make = PASSES[which]
    inputs = make((37, 100, 63, 5), torch.bfloat16, where, int8=int8, p=0.1)
    matrices = {key for key, value in inputs.items() if torch.is_tensor(value) and value.dim() == 2}
    relaid = {key: layout(value) if key in matrices else value for key, value in inputs.items()}
    expected = getattr(room, name)(**inputs)
    for actual, plain in zip(getattr(room, name)(**relaid), expected, strict=True):
        if room is gpu:
            assert torch.equal(actual, plain), "the order of summation depends on the strides"
    compare(getattr(room, name), getattr(reference, name), relaid)


def test_expanded_gradient(room, where):
    """The gradient of a sum has strides 0."""
    inputs = backward_inputs((37, 100, 63, 5), torch.float32, where, p=0.1)
    inputs["d_y"] = torch.ones((), device=where).expand(37, 63)
    compare(room.lora_linear_backward, reference.lora_linear_backward, inputs)


def test_scale_in_bfloat16(room, where):
    """Mixed-precision policies and `model.to(bfloat16)` cast the scale of an int8 weight."""
    for name, make in PASSES.values():
        inputs = make((20, 48, 40, 8), torch.bfloat16, where, int8=True)
        inputs["w_scale"] = inputs["w_scale"].bfloat16()
        compare(getattr(room, name), getattr(reference, name), inputs)


@pytest.mark.parametrize("needed", ["needs_x", "needs_a", "needs_b"])
def test_only_needed_gradients(room, where, needed):
    inputs = backward_inputs((20, 48, 40, 8), torch.float32, where, p=0.1)
    everything = room.lora_linear_backward(**inputs)
    switches = {name: name == needed for name in ("needs_x", "needs_a", "needs_b")}
    unused = {"needs_x": ["x", "s"], "needs_a": ["s"], "needs_b": ["x"]}[needed]
    some = room.lora_linear_backward(**inputs | switches | dict.fromkeys(unused))
    for wanted, one, all_ in zip(switches.values(), some, everything, strict=True):
        assert torch.equal(one, all_) if wanted else one.numel() == 0


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
def test_same_bits_every_time(room, where, int8):
    """Over more tokens than one slice of the token reduction holds."""
    inputs = backward_inputs((2100, 32, 24, 4), torch.bfloat16, where, int8=int8, p=0.1)
    first, second = room.lora_linear_backward(**inputs), room.lora_linear_backward(**inputs)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    compare(room.lora_linear_backward, reference.lora_linear_backward, inputs)


def test_inputs_are_not_written(room, where):
    for name, make in PASSES.values():
        inputs = make((37, 100, 63, 5), torch.float32, where, int8=True, p=0.1)
        before = {key: value.clone() for key, value in inputs.items() if torch.is_tensor(value)}
        getattr(room, name)(**inputs)
        assert all(torch.equal(inputs[key], value) for key, value in before.items())


def test_no_tokens(room, where):
    inputs = linear_inputs((0, 48, 40, 8), torch.float32, where, p=0.1)
    y, s = room.lora_linear(**inputs)
    assert y.shape == (0, 40)
    assert s.shape == (0, 8)


def test_rank_past_the_limit():
    with pytest.raises(ValueError, match="rank: expected 1 to 256, found 257"):
        gpu.lora_linear(**linear_inputs((4, 8, 8, 257), torch.float32, "cpu"))
