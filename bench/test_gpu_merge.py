"""Whether merging runs at the speed of memory: against a copy that reads and writes as many bytes."""

from __future__ import annotations

import pytest
import torch
from gpu import copies
from gpu_layers import BF16
from torch import Tensor

from fastlora import ops
from fastlora_kernels import reference

pytestmark = pytest.mark.gpu
COPY = "copy of as many bytes"
R = 16


def operands(place, N: int, K: int, int8: bool, seed: int = 0) -> tuple:
    generator = torch.Generator(place.device).manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=place.device)

    w = random(N, K) / K**0.5
    codes = ops.quantize_rows(w) if int8 else (w.to(BF16), None)
    return *codes, random(R, K) / K**0.5, random(N, R) / 50, 2.0


def same_bytes(count: int, device: str) -> tuple[Tensor, Tensor]:
    """Tensors whose copy reads and writes `count` bytes."""
    source = torch.randint(0, 127, (count // 2,), dtype=torch.int8, device=device)
    return source, torch.empty_like(source)


@pytest.mark.parametrize("kind", ["int8", "bf16"])
@pytest.mark.parametrize("N", [4096, 14336])
def test_merge(race, place, N, kind):
    N, K, int8 = place.size(N), place.size(4096), kind == "int8"
    inputs = operands(place, N, K, int8)
    for found, exact in zip(ops.merge_rows(*inputs), reference.merge_rows(*inputs), strict=True):
        assert torch.equal(found, exact)
    # int8 is read twice, for the row's largest value and for its codes, and written once; bf16 read and written once.
    count = 3 * N * K if int8 else 4 * N * K
    rotation = range(copies(count, place.device))

    def merges() -> list:
        sets = [operands(place, N, K, int8, seed) for seed in rotation]
        return [lambda one=one: ops.merge_rows(*one) for one in sets]

    def plain_copies() -> list:
        pairs = [same_bytes(count, place.device) for _ in rotation]
        return [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]

    sizes, work = {"N": N, "K": K, "r": R}, {"flop": 2.0 * N * K * R, "bytes": float(count)}
    race(
        "merge", f"{N} x {K}, {kind}, r={R}", {COPY: plain_copies, "fastlora": merges}, [COPY], sizes=sizes, work=work,
    )  # fmt: skip
