"""`lora_linear_mixed` in every room against the reference in float64, and as an operator."""

import pytest
import torch
from accuracy import compare, to_float64
from inputs import DTYPES, linear_inputs
from torch.library import opcheck

from fastlora import ops
from fastlora_kernels import reference

# Tokens per row, the adapter of each row, and the adapters' ranks.
BATCHES = {
    "one-token-each": (1, [1, -1, 0, 2, 1], [3, 8, 5]),
    "ragged": (13, [2, 0, 0, -1, 1], [3, 17, 5]),
    "none": (7, [-1, -1, -1], [4, 4]),
    "one-adapter": (5, [0, -1], [6]),
    "several-in-a-tile": (5, [0, 2, 1, 0, -1, 2, 1], [3, 17, 70]),
    "many": (2, [40, 63, 0, 17, 40], [1 + i % 7 for i in range(64)]),
}
ORDER = ["x", "w", "w_scale", "bias", "a", "b", "ranks", "scales", "rows", "ps", "seed"]


def mixed_inputs(batch, dtype, device, p=0.0, **options):
    """Arguments of `lora_linear_mixed`."""
    tokens, rows, ranks = batch
    inputs = linear_inputs((tokens * len(rows), 70, 41, sum(ranks)), dtype, device, p=p, **options)
    scales = [0.2 + 0.1 * (i % 5) for i in range(len(ranks))]
    # With dropout, some adapters drop less and some nothing.
    ps = [p / (1 + i % 3) if i % 3 < 2 else 0.0 for i in range(len(ranks))]
    inputs |= dict(ranks=ranks, scales=scales, rows=torch.tensor(rows, device=device), ps=ps)
    return {name: inputs[name] for name in ORDER}


def backward_inputs(*args, **options):
    """Arguments of `lora_linear_mixed_backward`."""
    inputs = mixed_inputs(*args, **options)
    y, s = reference.lora_linear_mixed(**inputs)
    del inputs["bias"]
    return dict(d_y=torch.randn_like(y), s=s, needs_x=True, needs_a=True, needs_b=True, **inputs)


@pytest.mark.parametrize("options", [{}, dict(int8=True, p=0.25)], ids=["dense", "int8-dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_matches_reference(room, where, batch, dtype, options):
    forward, backward = mixed_inputs(batch, dtype, where, **options), backward_inputs(batch, dtype, where, **options)
    compare(room.lora_linear_mixed, reference.lora_linear_mixed, forward)
    compare(room.lora_linear_mixed_backward, reference.lora_linear_mixed_backward, backward)


def test_each_row_is_that_of_its_adapter_alone(room, where):
    """In the reference's words for a single adapter, with the dropout of the whole batch."""
    tokens, rows, ranks = BATCHES["ragged"]
    inputs = to_float64(mixed_inputs(BATCHES["ragged"], torch.float32, where, p=0.25, int8=True))
    (mixed, mixed_s), ends = reference.lora_linear_mixed(**inputs), torch.tensor(ranks).cumsum(0).tolist()
    for i, adapter in enumerate(rows):
        part = slice(ends[adapter] - ranks[adapter], ends[adapter])
        own = dict(
            a=inputs["a"][part], b=inputs["b"][:, part], scale=inputs["scales"][adapter], p=inputs["ps"][adapter]
        )
        alone = {k: v for k, v in inputs.items() if k not in ("ranks", "scales", "rows", "ps")} | own
        if adapter < 0:
            alone |= dict(a=None, b=None)
        y, s = reference.lora_linear(**alone)
        own_tokens = slice(i * tokens, (i + 1) * tokens)
        torch.testing.assert_close(mixed[own_tokens], y[own_tokens])
        torch.testing.assert_close(mixed_s[own_tokens, : s.shape[1]], s[own_tokens])
        assert not mixed_s[own_tokens, s.shape[1] :].any()


@pytest.mark.parametrize("rows", [[5, -7, 2], [3, 64, 10**12]])
def test_an_index_out_of_range_is_no_adapter(room, where, rows):
    inputs = mixed_inputs((4, [-1, -1, -1], [3, 3]), torch.float32, where)
    expected = room.lora_linear_mixed(**inputs)
    found = room.lora_linear_mixed(**inputs | dict(rows=torch.tensor(rows, device=where)))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_same_bits_every_time(room, where):
    inputs = backward_inputs(BATCHES["ragged"], torch.bfloat16, where, p=0.1)
    first, second = (room.lora_linear_mixed_backward(**inputs) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("room", ["reference", "cpu", "gpu"])
def test_opcheck(room, device):
    inputs = mixed_inputs(
        BATCHES["one-token-each"], torch.bfloat16, "cpu" if room == "cpu" else device, p=0.1, int8=True
    )
    inputs |= {name: inputs[name].requires_grad_() for name in ("x", "a", "b")}
    with ops.using(room):
        opcheck(torch.ops.fastlora.lora_linear_mixed, tuple(inputs.values()))


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_gradients_are_finite_differences(p, device):
    inputs = to_float64(mixed_inputs((2, [1, -1, 0], [2, 3]), torch.float32, device, p=p, int8=True))
    leaves = [inputs[name].requires_grad_() for name in ("x", "a", "b")]
    assert torch.autograd.gradcheck(
        lambda x, a, b: ops.lora_linear_mixed(**inputs | dict(x=x, a=a, b=b)), tuple(leaves)
    )  # fmt: skip


def test_refuses_what_does_not_fit():
    inputs = mixed_inputs(BATCHES["ragged"], torch.float32, "cpu")
    with pytest.raises(ValueError, match="expected a batch of 5 rows"):
        ops.lora_linear_mixed(**inputs | dict(x=inputs["x"][1:]))
    with pytest.raises(ValueError, match="ranks: expected a sum of 25"):
        ops.lora_linear_mixed(**inputs | dict(ranks=[3, 3, 3]))
