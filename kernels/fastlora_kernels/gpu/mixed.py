"""`lora_linear_mixed` and its backward on the kernels of one adapter, with the adapters side by side as if one.

s of every adapter comes from one read of x; what is not a token's own is then zeroed, so each row's B alone remains in
the product that y starts from. Nothing is sorted or gathered, and an index out of range matches no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..reference.mixed import own_columns
from .checks import check_rank
from .input_gradient import input_gradient
from .linear import expand
from .shrink import shrink
from .tiles import MAX_RANK
from .token_reduce import token_reduce


def _parts(ranks: Sequence[int]) -> list[slice]:
    """The ranks in pieces that one launch takes, adapters kept whole."""
    parts, first, last = [], 0, 0
    for rank in ranks:
        check_rank(rank, MAX_RANK)
        if last + rank - first > MAX_RANK:
            parts.append(slice(first, last))
            first = last
        last += rank
    return [*parts, slice(first, last)]


def _own(s_of: Callable[[slice], Tensor], ranks: Sequence[int], own: Tensor) -> Tensor:
    """s of all adapters `[M, sum of ranks]`, zero at the tokens of others."""
    pieces = [s_of(part) for part in _parts(ranks)]
    s = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    return s.masked_fill_(~own, 0.0)


def _scaled(b: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """B with each adapter's scale in its columns, at least in float32."""
    wide = b.to(torch.promote_types(b.dtype, torch.float32))
    return torch.cat([scale * part for scale, part in zip(scales, wide.split(list(ranks), dim=1), strict=True)], dim=1)


def lora_linear_mixed(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor | None,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    rows: Tensor,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """The contract is in `reference.lora_linear_mixed`. Ranks up to 256 each."""
    own = own_columns(rows, ranks, x.shape[0])
    s = _own(lambda part: shrink(x, a[part], p, seed), ranks, own)
    return expand(x, w, w_scale, bias, s, _scaled(b, ranks, scales), 1.0)


def lora_linear_mixed_backward(
    d_y: Tensor,
    x: Tensor | None,
    w: Tensor,
    w_scale: Tensor | None,
    a: Tensor,
    b: Tensor,
    ranks: Sequence[int],
    scales: Sequence[float],
    rows: Tensor,
    p: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_a: bool,
    needs_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract is in `reference.lora_linear_mixed_backward`. Ranks up to 256 each."""
    d_x, d_a, d_b = d_y.new_empty(0), a.new_empty(0), b.new_empty(0)
    own = own_columns(rows, ranks, d_y.shape[0])
    scaled = _scaled(b, ranks, scales)
    d_s = _own(lambda part: shrink(d_y, scaled[:, part].T), ranks, own)
    if needs_a and x is not None:
        d_a = torch.empty_like(a, memory_format=torch.contiguous_format)
        for part in _parts(ranks):
            token_reduce(d_s[:, part], x, 1.0, p, seed, out=d_a[part])
    if needs_b and x is not None:
        d_b = torch.empty(b.shape, dtype=scaled.dtype, device=b.device)
        s = _own(lambda part: shrink(x, a[part], p, seed), ranks, own)
        for part in _parts(ranks):
            token_reduce(s[:, part], d_y, out=d_b[:, part].T)
        d_b = _scaled(d_b, ranks, scales).to(b.dtype)
    if needs_x:
        d_x = input_gradient(d_y, w, w_scale, d_s, a, p, seed)
    return d_x, d_a, d_b
