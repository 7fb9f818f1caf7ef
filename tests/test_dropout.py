"""The dropout mask: the same bits everywhere, and statistically a coin."""

import pytest
import torch

from fastlora_kernels import cpu, gpu, reference

SEEDS = [0, 1, -1, 2**31, 2**62 + 12345, -(2**63)]


def seed_of(value, device="cpu"):
    return torch.tensor([value], device=device)


def kept(seed, M, K, p):
    return reference.dropout_mask(seed_of(seed), M, K, p)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 1), (37, 101), (64, 256), (3, 1000)], ids=str)
def test_same_bits_in_every_room(seed, shape, device):
    expected = kept(seed, *shape, 0.3)
    assert torch.equal(cpu.dropout_mask(seed_of(seed), *shape, 0.3), expected)
    assert torch.equal(gpu.dropout_mask(seed_of(seed, device), *shape, 0.3).cpu(), expected)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.05, 0.5, 0.999])
def test_same_bits_at_every_p(p, device):
    expected = kept(7, 40, 300, p)
    assert torch.equal(cpu.dropout_mask(seed_of(7), 40, 300, p), expected)
    assert torch.equal(gpu.dropout_mask(seed_of(7, device), 40, 300, p).cpu(), expected)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 12345])
def test_kept_share(p, seed):
    M, K = 1000, 1001
    share = kept(seed, M, K, p).double().mean().item()
    exact = 1 - reference.drop_threshold(p) / 2**reference.LANE_BITS
    assert abs(share - exact) < 5 * (p * (1 - p) / (M * K)) ** 0.5, "more than five standard deviations"


def correlation(one, other, p):
    """Of two masks of independent coins: normal with deviation 1 / sqrt(n)."""
    product = (one.double() - (1 - p)) * (other.double() - (1 - p))
    return product.mean().item() / (p * (1 - p)) * product.numel() ** 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 16, 128])
def test_no_correlation_between_neighbours(lag):
    mask = kept(99, 1000, 1000, 0.5)
    assert abs(correlation(mask[:, lag:], mask[:, :-lag], 0.5)) < 5
    assert abs(correlation(mask[lag:], mask[:-lag], 0.5)) < 5


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 20261])
def test_no_correlation_at_any_distance(seed, p):
    """The autocorrelation of a long mask: the largest of half a million normal deviates is about 5."""
    n = 1 << 20
    centred = kept(seed, 1024, n // 1024, p).flatten().double()
    centred -= 1 - reference.drop_threshold(p) / 2**reference.LANE_BITS
    spectrum = torch.fft.rfft(centred, n=2 * n)
    products = torch.fft.irfft(spectrum.abs().square(), n=2 * n)[1 : n // 2]
    deviates = products / (n - torch.arange(1, n // 2)).sqrt() / (p * (1 - p))
    assert deviates.abs().max() < 6.5


@pytest.mark.parametrize("other", [1, 2, -1, 2**16, 2**32, 2**48])
def test_no_correlation_between_seeds(other):
    p = 0.1
    one, two = kept(0, 1000, 1000, p), kept(other, 1000, 1000, p)
    assert abs(correlation(one, two, p)) < 5
    for shift in (1, 2, 1000):
        assert abs(correlation(one.flatten()[shift:], two.flatten()[:-shift], p)) < 5


def test_rows_and_columns_are_fair():
    mask, p = kept(5, 2000, 2000, 0.2), 0.2
    deviation = (p * (1 - p) / 2000) ** 0.5
    for axis in (0, 1):
        shares = mask.double().mean(dim=axis)
        assert (shares - (1 - p)).abs().max() < 6 * deviation
        assert abs(shares.std().item() / deviation - 1) < 0.1, "spread unlike that of independent coins"
