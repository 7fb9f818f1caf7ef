"""The counted bytes of a launch are those that its kernel reads and writes in Triton's interpreter."""

import importlib

import numpy as np
import pytest
import torch
from inputs import make_weight

from fastlora_kernels.gpu import merge, traffic

SHAPES = {"one-block": (16, 64, 4), "ragged": (37, 101, 5), "several-blocks": (64, 256, 16)}


@pytest.fixture
def moved(monkeypatch):
    """Bytes that the kernels loaded and stored so far, by the address of the byte's tensor: `(loads, stores)`."""
    if torch.cuda.is_available():
        pytest.skip("counts what the interpreter does, and on this machine the kernels run on a GPU")
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    loads, stores = [], []

    def counting(name, found, pointer_at, mask_at):
        plain = getattr(builder, name)

        def counted(self, *args, **options):
            pointers, mask = args[pointer_at].data, args[mask_at].data
            size = args[pointer_at].get_element_ty().primitive_bitwidth // 8
            found.append((np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64), size))
            return plain(self, *args, **options)

        monkeypatch.setattr(builder, name, counted)

    counting("create_masked_load", loads, 0, 1)
    counting("create_masked_store", stores, 0, 2)
    return loads, stores


def bytes_within(accesses: list, *tensors: torch.Tensor) -> tuple[int, int]:
    """All bytes accessed within tensors, and how many of them are different ones."""
    total, places = 0, set()
    for addresses, size in accesses:
        for tensor in tensors:
            inside = (addresses >= tensor.data_ptr()) & (addresses < tensor.data_ptr() + tensor.nbytes)
            total += int(inside.sum()) * size
            places |= {int(address) + byte for address in addresses[inside] for byte in range(size)}
    return total, len(places)


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_merge_rows(moved, shape, int8):
    N, K, R = shape
    w, w_scale = make_weight(N, K, torch.bfloat16, int8, "cpu")
    a, b = torch.randn(R, K), torch.randn(N, R)
    out, out_scale = torch.empty_like(w), torch.empty(N if int8 else 0)
    scale = torch.ones(1, dtype=torch.float64)
    launch = merge.merge_rows_launch(w, w_scale, a, b, scale, out, out_scale)
    launch.run(w.device)
    loads, stores = moved
    counted = traffic.merge_rows_traffic(launch)
    weight = bytes_within(loads, w)[0] + bytes_within(stores, out)[0]
    assert counted.weight == weight == (3 * N * K if int8 else 2 * N * K * w.element_size())
    small = [tensor for tensor in (a, b, scale, w_scale) if tensor is not None]
    read, different = bytes_within(loads, *small)
    assert counted.small == different + bytes_within(stores, out_scale)[0]
    assert counted.repeated == read - different
    assert not bytes_within(loads, out)[0]


@pytest.mark.parametrize("int8", [False, True], ids=["dense", "int8"])
@pytest.mark.parametrize("size", [(4096, 4096), (14336, 4096)], ids=str)
def test_large_merges_move_little_but_the_weight(size, int8):
    """Within 5 % of the ideal: int8 twice read and once written, a dense weight once each."""
    N, K = size
    w = torch.empty(N, K, dtype=torch.int8 if int8 else torch.bfloat16, device="meta")
    w_scale = torch.empty(N, device="meta") if int8 else None
    a, b = torch.empty(16, K, device="meta"), torch.empty(N, 16, device="meta")
    scale = torch.empty(1, dtype=torch.float64, device="meta")
    launch = merge.merge_rows_launch(w, w_scale, a, b, scale, w, torch.empty(N if int8 else 0, device="meta"))
    ideal = 3 * N * K if int8 else 4 * N * K
    assert ideal <= traffic.merge_rows_traffic(launch).memory <= 1.05 * ideal
