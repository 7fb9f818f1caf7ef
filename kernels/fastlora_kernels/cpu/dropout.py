"""The dropout mask in whole-tensor int32 and int16 operations, and its application without a multiplication."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import HASH_MULTIPLIER_1, HASH_MULTIPLIER_2, LANE_MASK, SEED_OFFSET, drop_threshold


def dropout_mask(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    return keep_bits(seed, M, K, p) != 0


def keep_bits(seed: Tensor, M: int, K: int, p: float) -> Tensor:
    """int16 `[M, K]`: all bits set where the element is kept, none where it is dropped."""
    key_1, key_2 = _keys(int(seed))
    words_per_row = (K + 1) // 2
    words = torch.arange(M * words_per_row, dtype=torch.int64 if M * words_per_row >= 1 << 31 else torch.int32)
    words = words.to(torch.int32).bitwise_xor_(key_1)
    _mix_(words, key_2)
    # A little-endian int32 viewed as int16 has its lower half first, as the reference orders the lanes.
    lanes = words.view(torch.int16).view(M, 2 * words_per_row)[:, :K]
    return lanes.bitwise_and_(LANE_MASK).neg_().add_(drop_threshold(p) - 1).bitwise_right_shift_(15)


def dropped(x: Tensor, keep: Tensor) -> Tensor:
    """`x` where kept and zero elsewhere, not rescaled; `keep` from `keep_bits`."""
    integer = torch.int16 if x.element_size() == 2 else torch.int32
    return x.view(integer).bitwise_and(keep.to(integer)).view(x.dtype)


def drop_(x: Tensor, keep: Tensor) -> Tensor:
    """`dropped`, in place."""
    integer = torch.int16 if x.element_size() == 2 else torch.int32
    x.view(integer).bitwise_and_(keep.to(integer))
    return x


def _mix_(words: Tensor, key: int) -> None:
    shifted = torch.bitwise_right_shift(words, 16)
    words.bitwise_xor_(shifted).mul_(HASH_MULTIPLIER_1).bitwise_xor_(key)
    torch.bitwise_right_shift(words, 15, out=shifted)
    words.bitwise_xor_(shifted).mul_(HASH_MULTIPLIER_2)
    torch.bitwise_right_shift(words, 16, out=shifted)
    words.bitwise_xor_(shifted)


def _keys(seed: int) -> tuple[int, int]:
    low, high = _wrap(seed), _wrap(seed >> 32)
    return _mix(_wrap(low + _mix(high + SEED_OFFSET))), _mix(_wrap(high + _mix(low + SEED_OFFSET)))


def _mix(word: int) -> int:
    word = _wrap(word)
    word = _wrap((word ^ (word >> 16)) * HASH_MULTIPLIER_1)
    word = _wrap((word ^ (word >> 15)) * HASH_MULTIPLIER_2)
    return word ^ (word >> 16)


def _wrap(value: int) -> int:
    """The int32 with the same low 32 bits."""
    return ((value + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
