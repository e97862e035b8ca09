"""What a step of training sees, from its number alone: a permutation of all rows that nobody has to keep.

A balanced Feistel network permutes the numbers of an even number of bits; numbers beyond the last row are sent through it again until they
fall among the rows (cycle walking). It takes no memory, and neither a stop nor another number of processes changes what comes next.
"""

from __future__ import annotations

ROUNDS = 6
_WORD = 2**64 - 1


def sample_index(seed: int, epoch: int, place: int, count: int) -> int:
    """The row at a place of an epoch; over all places of an epoch every row comes once.

    Args:
        seed: Of the order.
        epoch: Of which every one has an order of its own.
        place: From 0 to ``count`` − 1.
        count: Number of rows.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(ROUNDS):
            key = _mixed(_mixed(_mixed(seed & _WORD) ^ epoch) ^ number)
            left, right = right, left ^ (_mixed(key ^ right) & mask)
        place = left << half | right
        if place < count:
            return place


def _mixed(word: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every other."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _WORD
    return word ^ word >> 31
