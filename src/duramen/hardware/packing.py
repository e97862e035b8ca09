"""Several products of few bits in one multiplier of an FPGA: which layouts fit its ports, and how many products may be summed before they are taken apart.

Operands lie side by side on the two ports, far enough apart that the fields of their products do not run into each other. An eight-bit weight is split into a signed high and an
unsigned low half, q = 16h + l, so that both rows of four bits and halves of rows of eight run on the same lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from duramen.problem import Problem

Factor = Literal[2, 3, 4]
"""Products of one multiplier: two or three weights by one activation, or two by two."""
SIGNED, UNSIGNED = (-8, 7), (0, 15)
"""Values of a weight of four bits, or of the high half of one of eight; and of the low half."""
FOR_SUMS = 22
"""Spacing of two weights on the wide port, by which whole dot products are summed inside the multiplier's own accumulator."""


@dataclass(frozen=True)
class Packing:
    """One layout.

    Attributes:
        factor: Products at once.
        activation_bits: Of a signed activation.
        spacing: Bits between two fields.
        sums: How many products of a field may be added before the fields are taken apart, in the worst case.
    """

    factor: Factor
    activation_bits: int
    spacing: int
    sums: int


def signed_range(bits: int) -> tuple[int, int]:
    """Least and greatest value of a signed number."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def product_range(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Least and greatest product of two ranges."""
    corners = [a * b for a in one for b in other]
    return min(corners), max(corners)


def summable(spacing: int, products: tuple[int, int]) -> int:
    """How many products stay inside a signed field of so many bits."""
    low, high = products
    least = 1 << (spacing - 1)
    most = least - 1
    return min(least // -low if low < 0 else least, most // high if high > 0 else most)


def port_bits(fields: list[tuple[tuple[int, int], int]]) -> int:
    """Bits of a signed port that holds values of these ranges, shifted by these places."""
    low: int = sum(bounds[0] << place for bounds, place in fields)
    high: int = sum(bounds[1] << place for bounds, place in fields)
    return max((-low - 1).bit_length() if low < 0 else 0, high.bit_length()) + 1


def layout(factor: Factor, activation_bits: int, spacing: int, multiplier: tuple[int, int]) -> Packing | None:
    """A layout, with the sums that it allows for weights of either kind; None if a port cannot hold it, or not even one product stays in its field.

    Args:
        factor: Products at once.
        activation_bits: Of a signed activation.
        spacing: Bits between two fields.
        multiplier: Widths of the ports, the wide one first.
    """
    wide, narrow = multiplier
    activation = signed_range(activation_bits)
    weights = [(SIGNED, spacing * place) for place in range(2 if factor != 3 else 3)]
    if factor == 4:
        fits = port_bits(weights) <= narrow and port_bits([(activation, 0), (activation, 2 * spacing)]) <= wide
    else:
        fits = port_bits(weights) <= wide and activation_bits <= narrow
    sums = min(summable(spacing, product_range(each, activation)) for each in (SIGNED, UNSIGNED))
    return Packing(factor, activation_bits, spacing, sums) if fits and sums else None


def packing_table(factor: Factor, activation_bits: int, multiplier: tuple[int, int]) -> list[Packing]:
    """All layouts of a factor, the closest first; empty where none fits."""
    found = (layout(factor, activation_bits, spacing, multiplier) for spacing in range(4, multiplier[0]))
    return [each for each in found if each is not None]


def best_packing(factor: Factor, activation_bits: int, multiplier: tuple[int, int]) -> Packing:
    """The layout that allows the most sums.

    Raises:
        Problem: If none fits, with the widest activations that would.
    """
    found = packing_table(factor, activation_bits, multiplier)
    if not found:
        fitting = [bits for bits in range(2, 9) if packing_table(factor, bits, multiplier)]
        raise Problem(
            f"{factor} products of 4 by {activation_bits} bits do not fit a multiplier of {multiplier[0]} by {multiplier[1]}.",
            why="their fields run into each other, or off the port.",
            fix=f"activations of at most {max(fitting)} bits, or a smaller factor." if fitting else "a smaller factor.",
        )
    return max(found, key=lambda each: each.sums)


def split_code(code: int) -> tuple[int, int]:
    """The signed high and the unsigned low half of an eight-bit code."""
    return code >> 4, code & 15
