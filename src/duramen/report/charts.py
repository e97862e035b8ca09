"""Inline pictures for the report: SVG, whose colours come from the page's own variables, and small bitmaps, whose ground is clear, so that light, dark and print agree."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

WIDTH, ROW, LEFT, RIGHT = 360, 34, 56, 64
MAP_COLOUR = bytes.fromhex("3f88c5")
"""Of a full entry; seen on white and on black."""
FADED = 40
"""Opacity of what has left, of 255."""


def range_chart(found: dict[str, dict[str, float]]) -> str:
    """Horizontal bars of the medians with whiskers from the least to the greatest value.

    Args:
        found: Label -> median, low, high; all at least 0.

    Returns:
        An ``<svg>`` element.
    """
    top = max(value["high"] for value in found.values()) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / top
    parts = []
    for number, (label, value) in enumerate(found.items()):
        middle = ROW * number + ROW / 2
        end, low, high = (LEFT + value[key] * scale for key in ("median", "low", "high"))
        parts += [
            f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LEFT}" y="{middle - 9}" width="{end - LEFT:.1f}" height="18" class="bar {escape(label)}"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 5}v10M{high:.1f} {middle - 5}v10" class="whisker"/>',
            f'<text x="{max(end, high) + 8:.1f}" y="{middle + 4}">{value["median"]:.3g}</text>',
        ]
    return _svg(ROW * len(found), _words(found), parts)


def width_chart(blocks: list[int], kept: list[int], units: int) -> str:
    """One bar per block: how many units stay, of how many.

    Args:
        blocks: Their numbers.
        kept: Units that stay, for each.
        units: How many each had.

    Returns:
        An ``<svg>`` element.
    """
    row, left, right = 16, 40, 56
    scale = (WIDTH - left - right) / units
    words = "; ".join(f"block {block} {count} of {units}" for block, count in zip(blocks, kept, strict=True))
    parts = []
    for number, (block, count) in enumerate(zip(blocks, kept, strict=True)):
        top = row * number
        parts += [
            f'<text x="{left - 8}" y="{top + 12}" text-anchor="end" class="small">{block}</text>',
            f'<rect x="{left}" y="{top + 2}" width="{units * scale:.1f}" height="{row - 4}" class="bar before"/>',
            f'<rect x="{left}" y="{top + 2}" width="{count * scale:.1f}" height="{row - 4}" class="bar after"/>',
            f'<text x="{WIDTH - right + 8}" y="{top + 12}" class="small">{count:,}</text>',
        ]
    return _svg(row * len(blocks), words, parts)


def line_chart(points: list[tuple[float, float]], across: str, up: str) -> str:
    """Points joined by a line, with the least and the greatest value on either axis.

    Args:
        points: (x, y), in the order of x.
        across: What x is.
        up: What y is.

    Returns:
        An ``<svg>`` element.
    """
    height, left, right, top, bottom = 160, 56, 16, 20, 36
    (low_x, high_x), (low_y, high_y) = ((min(axis), max(axis)) for axis in zip(*points, strict=True))
    places = [
        (
            left + (x - low_x) / ((high_x - low_x) or 1) * (WIDTH - left - right),
            top + (high_y - y) / ((high_y - low_y) or 1) * (height - top - bottom),
        )
        for x, y in points
    ]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [
        f'<path d="M{path}" class="line"/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="dot"/>' for x, y in places),
        f'<text x="{left - 8}" y="{top + 4}" text-anchor="end" class="small">{high_y:.3g}</text>',
        f'<text x="{left - 8}" y="{height - bottom + 4}" text-anchor="end" class="small">{low_y:.3g}</text>',
        f'<text x="{left}" y="{height - bottom + 18}" class="small">{low_x:.3g}</text>',
        f'<text x="{WIDTH - right}" y="{height - bottom + 18}" text-anchor="end" class="small">{high_x:.3g}</text>',
        f'<text x="{(left + WIDTH - right) / 2}" y="{height - 6}" text-anchor="middle" class="small">{escape(across)}</text>',
        f'<text x="{left}" y="12" class="small">{escape(up)}</text>',
    ]
    words = "; ".join(f"{across} {x:.3g}: {up} {y:.3g}" for x, y in points)
    return _svg(height, words, parts)


def heat_map(values: list[list[float]], words: str) -> str:
    """A matrix as a picture, one pixel per entry, the stronger the larger its root.

    Args:
        values: Rows of entries from 0 to 1.
        words: What it shows, for those who do not see it.

    Returns:
        An ``<img>`` element.
    """
    return _bitmap([[(*MAP_COLOUR, round(255 * value**0.5)) for value in row] for row in values], words)


def photograph(pixels: list[list[list[int]]], words: str, *, there: list[list[bool]] | None = None) -> str:
    """An image, where patches that are not ``there`` fade.

    Args:
        pixels: [c, H, W] with one or three channels, from 0 to 255.
        words: What it shows, for those who do not see it.
        there: For every patch, [rows, columns]; None for all.

    Returns:
        An ``<img>`` element.
    """
    channels = pixels * 3 if len(pixels) == 1 else pixels
    height, width = len(channels[0]), len(channels[0][0])
    faded = (
        []
        if there is None
        else [[not there[y * len(there) // height][x * len(there[0]) // width] for x in range(width)] for y in range(height)]
    )
    return _bitmap(
        [
            [(*(channel[y][x] for channel in channels), FADED if faded and faded[y][x] else 255) for x in range(width)]
            for y in range(height)
        ],
        words,
    )


def _bitmap(rows: Sequence[Sequence[tuple[int, ...]]], words: str) -> str:
    """Rows of red, green, blue and opacity as an ``<img>`` element with a PNG in it."""
    content = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in rows)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(content, 9)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts)
    coded = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()
    return f'<img class="map" alt="{escape(words)}" src="data:image/png;base64,{coded}">'


def _svg(height: int, words: str, parts: list[str]) -> str:
    """The element, with what it shows in words for those who do not see it."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(words)}">{"".join(parts)}</svg>'


def _words(found: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        f"{label} {value['median']:.3g} ({value['low']:.3g} to {value['high']:.3g})" for label, value in found.items()
    )
