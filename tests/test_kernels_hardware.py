"""What the interpreter never asks for and a GPU does: descriptors within the hardware's rules, counters at zero."""

from types import SimpleNamespace

import pytest
import torch
from inputs import backward_inputs, linear_inputs

from fastlora import ops
from fastlora_kernels import gpu
from fastlora_kernels.gpu import descriptors, partial

DEVICE = torch.device("cuda", 0)
SHAPE = (1, 4096, 64, 8)  # few tokens and many features, whose sum several programs share
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs are a GPU's")


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        (torch.ones(64, 64)[:, ::2], (16, 16)),
        (torch.ones(64, 33), (16, 16)),
        (torch.ones(64, 64)[:, 1:], (16, 16)),
        (torch.ones(1, 64).expand(16, 64), (16, 16)),
        (torch.ones(256).unfold(0, 64, 8), (16, 16)),
        (torch.ones(64, 64, dtype=torch.int8), (16, 8)),
        (torch.ones(64, 64), (512, 16)),
        (torch.ones(0, 64), (16, 16)),
        (torch.ones(64, 64)[:, :0], (16, 16)),
    ],
    ids=[
        "strided-rows", "row-length", "first-element", "one-row-repeated", "overlapping-rows", "narrow-tile",
        "tall-tile", "no-rows", "no-columns",
    ],
)  # fmt: skip
def test_what_the_hardware_refuses_is_not_described(tensor, block):
    assert descriptors.matrix(tensor, *block) is None


@pytest.mark.parametrize("tensor", [torch.ones(1, 64), torch.ones(64, 40)[3:, 4:], torch.ones(5, 64).to(torch.int8)])
def test_rows_are_described_where_they_can_be(tensor):
    assert descriptors.matrix(tensor, 16, 32).shape == tensor.shape


@pytest.fixture
def stream(monkeypatch):
    """The stream that a GPU without one would have; memory is the host's."""
    now, zeros = SimpleNamespace(cuda_stream=0, synchronize=lambda: None), torch.zeros
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype, device: zeros(*shape, dtype=dtype))
    monkeypatch.setattr(partial, "_counters", {})
    monkeypatch.setattr(partial, "_reserves", {})
    return now


def test_counters_are_kept_for_the_default_stream(stream):
    first = partial.counters(3, DEVICE)
    assert first is partial.counters(500, DEVICE)
    larger = partial.counters(first.numel() + 1, DEVICE)
    assert larger is not first
    assert larger is partial.counters(3, DEVICE)


def test_counters_are_nobody_elses_where_a_graph_may_be_recorded(stream):
    """Kept ones would lie in memory that the graph reuses, or be counted on by two streams at once."""
    kept = partial.counters(3, DEVICE)
    stream.cuda_stream = 7
    ones = [partial.counters(3, DEVICE) for _ in range(2)]
    assert ones[0].data_ptr() != ones[1].data_ptr() != kept.data_ptr()
    assert list(partial._counters.values()) == [kept]


@needs_gpu
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_recorded_graph_gives_the_same_bits_each_time(which):
    make, run = (linear_inputs, gpu.lora_linear) if which == "forward" else (backward_inputs, gpu.lora_linear_backward)
    inputs = make(SHAPE, torch.bfloat16, "cuda", int8=True, p=0.1)
    expected = run(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = run(**inputs)
    for _ in range(2):
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(recorded, expected, strict=True))


@needs_gpu
def test_compiled_into_a_graph():
    """Which is warmed up in memory where nothing but results may remain."""
    x, *others = linear_inputs(SHAPE, torch.bfloat16, "cuda", int8=True).values()
    compiled = torch.compile(lambda x: ops.lora_linear(x, *others), mode="reduce-overhead")
    with torch.no_grad():
        expected = ops.lora_linear(x, *others)
        for _ in range(4):
            assert torch.equal(compiled(x), expected)
