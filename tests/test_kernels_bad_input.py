"""What the GPU kernels refuse, and sizes at which 32-bit offsets would wrap."""

import mmap

import pytest
import torch
from accuracy import compare
from inputs import backward_inputs, linear_inputs

from fastlora_kernels import gpu, reference
from fastlora_kernels.gpu.input_gradient import input_gradient

SHAPE = (5, 32, 24, 4)


def refused(error, message, function, inputs, **changes):
    with pytest.raises(error, match=message):
        function(**inputs | changes)


def test_forward_names_what_is_wrong():
    inputs = linear_inputs(SHAPE, torch.float32, "cpu", int8=True, p=0.1)
    for error, message, changes in [
        (ValueError, r"a: expected shape \[4, 32\], found \[4, 31\]", dict(a=torch.ones(4, 31))),
        (ValueError, r"b: expected shape \[24, 4\], found \[24, 3\]", dict(b=torch.ones(24, 3))),
        (ValueError, r"b: expected a tensor beside a", dict(b=None)),
        (ValueError, r"b: expected no tensor without a", dict(a=None)),
        (ValueError, r"x: expected shape \[5, 32\], found \[5, 33\]", dict(x=torch.ones(5, 33))),
        (ValueError, r"x: expected two axes, found shape \[1, 5, 32\]", dict(x=torch.ones(1, 5, 32))),
        (ValueError, r"w_scale: expected shape \[24\], found \[24, 1\]", dict(w_scale=torch.ones(24, 1))),
        (ValueError, r"bias: expected shape \[24\], found \[1\]", dict(bias=torch.ones(1))),
        (ValueError, r"bias: expected device cpu, that of w, found meta", dict(bias=torch.ones(24, device="meta"))),
        (ValueError, r"seed: expected one number on cpu, found \[2\]", dict(seed=torch.ones(2))),
        (ValueError, r"x: expected device cpu, that of w, found meta", dict(x=torch.ones(5, 32, device="meta"))),
        (ValueError, r"b: expected device cpu, that of w, found meta", dict(b=torch.ones(24, 4, device="meta"))),
        (ValueError, r"seed: expected one number on cpu, found \[1\] on meta", dict(seed=torch.ones(1, device="meta"))),
        (TypeError, r"x: expected one of .*, found torch.int32", dict(x=torch.ones(5, 32, dtype=torch.int32))),
        (TypeError, r"w: expected one of .* without a w_scale, found torch.int8", dict(w_scale=None)),
        (TypeError, r"w: expected one of \(torch.int8,\) with a w_scale, found", dict(w=torch.ones(24, 32))),
        (ValueError, r"expected axes up to 2147482624, found 2147483648 tokens",
         dict(x=torch.ones(1, 1).expand(2**31, 32))),
        (ValueError, r"expected axes up to 2147482624, found 5 tokens, 32 in and 2147483648 out features",
         dict(w=torch.ones(1, 1, dtype=torch.int8).expand(2**31, 32), b=torch.ones(1, 1).expand(2**31, 4), bias=None,
              w_scale=torch.ones(1).expand(2**31))),
    ]:  # fmt: skip
        refused(error, message, gpu.lora_linear, inputs, **changes)


def test_backward_names_what_is_wrong():
    inputs = backward_inputs(SHAPE, torch.float32, "cpu")
    for message, changes in [
        (r"d_y: expected shape \[5, 24\], found \[5, 25\]", dict(d_y=torch.ones(5, 25))),
        (r"x: expected shape \[5, 32\], found \[6, 32\]", dict(x=torch.ones(6, 32))),
        (r"s: expected shape \[5, 4\], found \[5, 8\]", dict(s=torch.ones(5, 8))),
        (r"d_y: expected device cpu, that of w, found meta", dict(d_y=torch.ones(5, 24, device="meta"))),
        (
            r"expected axes up to 2147482624, found 2147483648 tokens",
            dict(d_y=torch.ones(1, 1).expand(2**31, 24), x=None, s=None),
        ),
    ]:
        refused(ValueError, message, gpu.lora_linear_backward, inputs, **changes)


def test_accumulating_needs_something_to_add_to():
    with pytest.raises(ValueError, match="accumulate: expected out to add to, found None"):
        input_gradient(torch.ones(2, 8), torch.ones(8, 4), None, None, None, accumulate=True)


def test_input_gradient_adds_in_place(device):
    inputs = backward_inputs(SHAPE, torch.float32, device, p=0.1)
    d_s, before = torch.randn(5, 4, device=device), torch.randn(5, 32, device=device)
    arguments = inputs["d_y"], inputs["w"], None, d_s, inputs["a"], 0.1, inputs["seed"]
    alone, out = input_gradient(*arguments), before.clone()
    assert input_gradient(*arguments, out=out, accumulate=True) is out
    torch.testing.assert_close(out, before + alone)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_offsets_past_32_bits(device, which):
    """Rows of the weight that lie more than 2**31 elements apart."""
    if device != "cpu":
        pytest.skip("sparse memory is the host's")
    make, name = (linear_inputs, "lora_linear") if which == "forward" else (backward_inputs, "lora_linear_backward")
    inputs = make((3, 32, 4, 4), torch.float32, device, int8=True)
    stride = 2**30
    memory = mmap.mmap(-1, 3 * stride + 32, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    far = torch.frombuffer(memory, dtype=torch.int8).as_strided((4, 32), (stride, 1))
    far.copy_(inputs["w"])
    compare(getattr(gpu, name), getattr(reference, name), inputs | {"w": far})
