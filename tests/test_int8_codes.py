"""The codes and scales of int8 formats, apart from files."""

import pytest
import torch

from fastlora.checkpoints.int8 import INT8_FORMATS, pack, row_scale, unpack


def test_codes_are_packed_and_unpacked():
    """Low byte first, 128 added, zeros after the last code, for every rest of a division by four."""
    assert pack(torch.tensor([[-128, 0, 1, 127, -1]], dtype=torch.int8)).view(torch.uint8).tolist() == [
        [0, 128, 129, 255, 127, 0, 0, 0]
    ]
    for K in range(1, 9):
        codes = torch.randint(-128, 128, (3, K), dtype=torch.int8)
        assert torch.equal(unpack(pack(codes), K), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_code_is_clamped(dtype):
    """The stored scale is never so small that a value is beyond the last code by more than rounding."""
    largest = torch.logspace(-8, 4, 2000) if dtype == torch.float16 else torch.logspace(-30, 30, 2000)
    rows = torch.stack([largest, -largest / 3], dim=1)
    scale = row_scale(torch.cat([rows, torch.zeros(1, 2)]), dtype).float()
    assert (scale > 0).all()
    assert ((rows / scale[:-1]).round().abs() <= 127).all()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("to", INT8_FORMATS)
def test_values_are_within_half_a_code(to, dtype):
    """Rows of every size, of zeros, and with one value that dwarfs the others."""
    format = INT8_FORMATS[to]
    rows = torch.randn(64, 37) * torch.logspace(-4, 3, 64)[:, None]
    rows[5] = 0
    rows[7, 3] = 6e4
    found = format.dequantize(format.quantize(rows, dtype), 37)
    assert ((found - rows).abs() <= format.bound(rows, dtype)).all()
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    bound = format.bound(rows, dtype)
    assert (bound <= 0.6 * step)[step.flatten() > 0].all(), "a bound of more than a little over half a code"
