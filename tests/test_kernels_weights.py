"""Quantising and merging, bit for bit against the reference in every room."""

import pytest
import torch
from inputs import DTYPES, make_weight

from fastlora_kernels import reference

SHAPES = [(1, 1), (37, 101), (5, 1300), (130, 64)]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_rows(room, where, shape, dtype):
    w = torch.randn(*shape, device=where).to(dtype)
    w[0] = 0
    assert_same(room.quantize_rows(w), reference.quantize_rows(w))
    assert_same(room.quantize_rows(w.T), reference.quantize_rows(w.T))


def test_quantize_extremes(room, where):
    w = torch.tensor([[1e9, -1.0], [1e-9, -1e-9], [0.0, 0.0], [6e-8, 3e-8]], device=where)
    q, scale = room.quantize_rows(w)
    assert_same((q, scale), reference.quantize_rows(w))
    assert q[0, 0] == 127
    assert torch.isfinite(scale).all()
    assert (q[2] == 0).all()
    assert scale[2] == 0


def test_quantisation_error_is_half_a_step(room, where):
    w = torch.randn(64, 256, device=where)
    q, scale = room.quantize_rows(w)
    error = (reference.dequantize_rows(q, scale, torch.float64) - w.double()).abs()
    float16_error = w.abs().amax(1).double() * 2**-11
    assert (error <= (scale.double() / 2 + float16_error)[:, None]).all()


@pytest.mark.parametrize("rank", [1, 16, 37])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*DTYPES, "int8"], ids=str)
def test_merge_rows(room, where, kind, shape, rank):
    N, K = shape
    w, w_scale = make_weight(N, K, torch.float32 if kind == "int8" else kind, kind == "int8", where)
    a, b = torch.randn(rank, K, device=where), torch.randn(N, rank, device=where) / 50
    expected = reference.merge_rows(w, w_scale, a, b, 1 / 3)
    assert_same(room.merge_rows(w, w_scale, a, b, 1 / 3), expected)
    before = (w, w_scale) if kind == "int8" else (w,)
    assert any(not torch.equal(one, other) for one, other in zip(expected, before, strict=False))


def test_int8_merge_is_the_quantised_sum(room, where):
    w, w_scale = make_weight(60, 90, torch.float32, True, where)
    a, b = torch.randn(4, 90, device=where), torch.randn(60, 4, device=where) / 20
    total = w.double() * w_scale.double()[:, None] + 0.7 * (b.double() @ a.double())
    assert_same(room.merge_rows(w, w_scale, a, b, 0.7), reference.quantize_rows(total.float()))


def test_merge_of_a_transposed_weight(room, where):
    w = torch.randn(40, 60, device=where).T
    a, b = torch.randn(4, 40, device=where), torch.randn(60, 4, device=where)
    assert_same(room.merge_rows(w, None, a, b, 0.5), reference.merge_rows(w, None, a, b, 0.5))


def test_merge_in_16_bits_rounds_once(room, where):
    w = torch.randn(30, 50, device=where).bfloat16()
    a, b = torch.randn(8, 50, device=where), torch.randn(30, 8, device=where)
    exact = w.double() + 0.5 * (b.double() @ a.double())
    merged, _ = room.merge_rows(w, None, a, b, 0.5)
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8).all()
