"""Adapters that are a part of the frozen weight: PiSSA, OLoRA and LoftQ."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .target import Initial, Target, draw, moved_into_adapter


def low_rank(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """`A = sqrt(S) V^T` and `B = U sqrt(S)` from U `[N, R]`, S `[R]` and V^T `[R, K]`."""
    root = s.sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


def pissa(target: Target, iterations: int | None) -> Initial:
    """The R largest singular values and vectors of W, so that `scaling * B A` is W's best approximation of rank R.

    `A = sqrt(S / scaling) V^T`, `B = U sqrt(S / scaling)` (PiSSA, Meng et al. 2024, eq. 2-4).

    Args:
        iterations: None for the full decomposition; else the subspace iterations of a randomised one (Halko et al.
            2011), which is faster by orders of magnitude and depends on torch's generator.
    """
    weight, rank = target.dense(), target.rank
    if iterations is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        draw(target)
        u, s, v = torch.svd_lowrank(weight, rank, niter=iterations)
        vh = v.T
    a, b = low_rank(u[:, :rank], s[:rank] / target.scaling, vh[:rank])
    return moved_into_adapter(target, weight, a, b)


def olora(target: Target) -> Initial:
    """`W = Q R`: B is the first columns of Q, A the first rows of R (OLoRA, Büyükakyüz 2024, section 3)."""
    weight = target.dense()
    q, r = torch.linalg.qr(weight)
    a, b = r[: target.rank].contiguous(), q[:, : target.rank].contiguous()
    return moved_into_adapter(target, weight, a, b)


def loftq(target: Target, bits: int, iterations: int) -> Initial:
    """The quantised weight, and an adapter that is most of what it lacks (LoftQ, Li et al. 2023, algorithm 1).

    `Q = quantise(W - B A)`, then `B A ~ W - Q`, from `B A = 0`. As in PEFT, A and B are not divided by the scaling,
    so that `Q + scaling * B A` is the better approximation of W where alpha makes that 1.

    Args:
        bits: 4 for bitsandbytes' nf4 in blocks of 64, 8 for int8 with a scale per row.

    Raises:
        ValueError: 4 bits without bitsandbytes.
    """
    weight, rank = target.dense(), target.rank
    rest = weight
    for _ in range(iterations):
        quantised = _through_nf4(rest) if bits == 4 else _through_int8(rest)
        u, s, vh = torch.linalg.svd(weight - quantised, full_matrices=False)
        a, b = low_rank(u[:, :rank], s[:rank], vh[:rank])
        rest = weight - b @ a
    return Initial(a.float(), b.float(), quantised.to(target.dtype))


def _through_nf4(weight: Tensor) -> Tensor:
    """`weight` quantised to nf4 and back."""
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    except ImportError:
        raise ValueError("loftq_config: expected bitsandbytes to be installed for 4 bits, found none") from None
    codes, state = quantize_4bit(weight.float().contiguous(), quant_type="nf4", compress_statistics=False)
    return dequantize_4bit(codes, state).to(weight.dtype)


def _through_int8(weight: Tensor) -> Tensor:
    """`weight` quantised to int8 and back."""
    codes, scale = ops.quantize_rows(weight)
    return (codes.float() * scale[:, None]).to(weight.dtype)
