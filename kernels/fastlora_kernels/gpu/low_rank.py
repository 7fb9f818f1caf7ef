"""acc + up @ s.T: what the accumulator of a product with the weight starts from, for one adapter or one per token."""

from __future__ import annotations

import triton
import triton.language as tl

from .jit import convert, dot, load_tile


@triton.jit
def low_rank(
    up_ptr, stride_upc, stride_upr,  # [C, R], or [C, sum of ranks]
    s_ptr, stride_sm, stride_sr,  # [M, R]
    first_ptr,  # [E + 2] where tokens have adapters of their own, else None
    owner,  # [BLOCK_M] likewise
    acc, first_c, first_m, split, C, M, R, dtype: tl.constexpr,
    RANK_SPAN: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_C, BLOCK_M]`; each of SPLITS programs adds another share of the ranks.

    Tokens of one tile share the products: nan or inf in an adapter of one of them reaches the others of the tile.
    """
    if first_ptr is None:
        for r in tl.range(split * BLOCK_R, RANK_SPAN, SPLITS * BLOCK_R, num_stages=1):  # no registers for loads ahead
            s = load_tile(s_ptr, stride_sm, stride_sr, first_m, r, M, R, BLOCK_M, BLOCK_R, False)
            up = load_tile(up_ptr, stride_upc, stride_upr, first_c, r, C, R, BLOCK_C, BLOCK_R, False)
            acc = dot(convert(up, dtype), tl.trans(s), acc)
    else:
        # From the first column that one of the tokens owns, BLOCK_R at a time, past those that none does.
        offs_m = (first_m + tl.arange(0, BLOCK_M))[:, None]
        begin, end = tl.load(first_ptr + owner), tl.load(first_ptr + owner + 1)
        column, last = tl.min(begin, 0), tl.max(tl.where(begin < end, end, 0), 0)
        step = 0
        while column < last:
            if SPLITS == 1 or step % SPLITS == split:
                ranks = (column + tl.arange(0, BLOCK_R))[None, :] - begin[:, None]
                own = (ranks >= 0) & (ranks < (end - begin)[:, None])
                s = tl.load(s_ptr + offs_m.to(tl.int64) * stride_sm + ranks * stride_sr, own, other=0.0)
                up = load_tile(up_ptr, stride_upc, stride_upr, first_c, column, C, last, BLOCK_C, BLOCK_R, False)
                # What none of the tokens has may hold nan, which zeros of s would not silence.
                up = tl.where((tl.max(own.to(tl.int32), 0) > 0)[None, :], up, 0.0)
                acc = dot(convert(up, dtype), tl.trans(s), acc)
            column += BLOCK_R
            column = tl.min(tl.where(end > column, tl.maximum(begin, column), last), 0)
            step += 1
    return acc


@triton.jit
def of_owner(value, owner, first_ptr):
    """A number as it is, or from one per adapter those of a tile's tokens, `[1, BLOCK_M]`."""
    if first_ptr is not None:
        value = tl.load(value + owner)[None, :]
    return value
