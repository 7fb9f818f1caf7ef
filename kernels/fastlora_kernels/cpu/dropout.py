"""The dropout mask in whole-tensor int32 and int16 operations, and its application without a multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import (
    HASH_MULTIPLIER_1,
    HASH_MULTIPLIER_2,
    HASH_MULTIPLIER_3,
    LANE_BITS,
    LANE_MASK,
    SEED_OFFSET,
    drop_threshold,
)


def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    return keep_bits(seed, M, K, p) != 0


def keep_bits(seed: Tensor, M: int, K: int, p: float, first: int = 0) -> Tensor:
    """int16 `[M, K]`, from row `first` on: all bits set where the element is kept, none where it is dropped."""
    words = _hashed_words(seed, M, (K + 1) // 2, first)
    # Both lanes of a word at once: adding 2**15 - threshold carries a kept lane into its sign bit, never beyond it.
    carry = (1 << LANE_BITS) - drop_threshold(p)
    words.bitwise_and_(LANE_MASK * 0x10001).add_(_wrap(carry * 0x10001))
    # A little-endian int32 viewed as int16 has its lower half first, as the reference orders the lanes.
    return words.view(torch.int16).bitwise_right_shift_(15)[:, :K]


def _hashed_words(seed: Tensor, M: int, words_per_row: int, first: int) -> Tensor:
    """The reference's hash of the words `[M, words_per_row]` from row `first` on, in as few passes as torch allows."""
    key_1, key_2 = _keys(int(seed))
    # The first multiplication is linear in row and column, so it takes place before they are broadcast.
    step = words_per_row * HASH_MULTIPLIER_1
    rows = _wrapped_multiples(step, M, _wrap(key_1 + first * step))
    words = rows[:, None] + _wrapped_multiples(HASH_MULTIPLIER_1, words_per_row, 0)
    shifted = torch.bitwise_right_shift(words, 15)
    words.bitwise_xor_(shifted)
    torch.add(torch.tensor(key_2, dtype=torch.int32), words, alpha=HASH_MULTIPLIER_2, out=words)
    torch.bitwise_right_shift(words, 13, out=shifted)
    words.bitwise_xor_(shifted).mul_(HASH_MULTIPLIER_3)
    torch.bitwise_right_shift(words, 16, out=shifted)
    return words.bitwise_xor_(shifted)


def _wrapped_multiples(step: int, count: int, start: int) -> Tensor:
    """`start + step * [0, count)` as int32 that wraps."""
    return torch.arange(count, dtype=torch.int32).mul_(_wrap(step)).add_(start)


def dropped(x: Tensor, keep: Tensor) -> Tensor:
    """`x` where kept and zero elsewhere, not rescaled; `keep` from `keep_bits`."""
    integer = torch.int16 if x.element_size() == 2 else torch.int32
    return x.view(integer).bitwise_and(keep.to(integer)).view(x.dtype)


def drop_(x: Tensor, keep: Tensor) -> Tensor:
    """`dropped`, in place."""
    integer = torch.int16 if x.element_size() == 2 else torch.int32
    x.view(integer).bitwise_and_(keep.to(integer))
    return x


def _keys(seed: int) -> tuple[int, int]:
    low, high = _wrap(seed), _wrap(seed >> 32)
    return _mix(low + _mix(high + SEED_OFFSET)), _mix(high + _mix(low + SEED_OFFSET))


def _mix(word: int) -> int:
    word = _wrap(word * HASH_MULTIPLIER_1)
    word = _wrap((word ^ (word >> 15)) * HASH_MULTIPLIER_2)
    word = _wrap((word ^ (word >> 13)) * HASH_MULTIPLIER_3)
    return word ^ (word >> 16)


def _wrap(value: int) -> int:
    """The int32 with the same low 32 bits."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
