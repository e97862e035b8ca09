"""Inline pictures for the report: SVG, whose colours come from the page's own variables, and small bitmaps, whose ground is clear, so that light, dark and print agree."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape
from math import log

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
    axes = _Axes([x for x, _ in points], [y for _, y in points])
    places = [axes.place(*point) for point in points]
    dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="dot"/>' for x, y in places)
    words = "; ".join(f"{across} {x:.3g}: {up} {y:.3g}" for x, y in points)
    return _svg(axes.height, words, [axes.line(points), *dots, *axes.texts(across, up)])


def courses_chart(before: list[tuple[float, float]], after: list[tuple[float, float]], across: str, up: str) -> str:
    """Two courses of the same thing from 0 on, the first in the colour of what was before.

    Args:
        before: (x, y), in the order of x.
        after: Likewise.
        across: What x is.
        up: What y is.

    Returns:
        An ``<svg>`` element.
    """
    axes = _Axes([x for x, _ in before + after], [0.0, *(y for _, y in before + after)])
    words = f"{up}: at most {max(y for _, y in before):.3g} before, {max(y for _, y in after):.3g} after"
    return _svg(axes.height, words, [axes.line(before, "line before"), axes.line(after), *axes.texts(across, up)])


def scatter_chart(points: list[tuple[float, float]], front: list[tuple[float, float]], across: str, up: str) -> str:
    """All points, and a line through those that are on the front.

    Args:
        points: (x, y).
        front: Some of them, in the order of x; the last is the one that was chosen.
        across: What x is.
        up: What y is.

    Returns:
        An ``<svg>`` element.
    """
    axes = _Axes([x for x, _ in points], [y for _, y in points])
    marks = [('<circle cx="{:.1f}" cy="{:.1f}" r="2" class="bar before"/>').format(*axes.place(*point)) for point in points]
    marks += [axes.line(front)]
    marks += [('<circle cx="{:.1f}" cy="{:.1f}" r="4" class="dot"/>').format(*axes.place(*front[-1]))]
    words = f"{len(points)} candidates; " + "; ".join(f"{across} {x:.3g}: {up} {y:.3g}" for x, y in front)
    return _svg(axes.height, words, [*marks, *axes.texts(across, up)])


def roofline_chart(points: list[tuple[float, float]], peak: float, slope: float, across: str, up: str) -> str:
    """Points under the roof that a peak and a bandwidth make, on logarithmic axes.

    Args:
        points: (work per thing moved, work per time), above zero.
        peak: The most work per time.
        slope: Things moved per time.
        across: What x is.
        up: What y is.

    Returns:
        An ``<svg>`` element.
    """
    ridge = peak / slope
    low, high = min(ridge / 4, *(x for x, _ in points)), max(ridge * 4, *(x for x, _ in points))
    axes = _Axes([low, high], [min(low * slope, *(y for _, y in points)), peak], logarithmic=True)
    roof = [(low, low * slope), (ridge, peak), (high, peak)]
    marks = [axes.line(roof, "whisker")]
    marks += [('<circle cx="{:.1f}" cy="{:.1f}" r="3" class="dot"/>').format(*axes.place(*point)) for point in points]
    words = f"roof {peak:,.0f} {up} from {ridge:.3g} {across}; " + "; ".join(f"{x:.3g}: {y:.3g}" for x, y in points)
    return _svg(axes.height, words, [*marks, *axes.texts(across, up)])


class _Axes:
    """Where points of a chart are, and what stands at its edges."""

    height, left, right, top, bottom = 160, 56, 16, 20, 36

    def __init__(self, xs: list[float], ys: list[float], *, logarithmic: bool = False) -> None:
        self.logarithmic = logarithmic
        self.x, self.y = (min(xs), max(xs)), (min(ys), max(ys))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """In the drawing."""
        across, up = self._share(x, *self.x), self._share(y, *self.y)
        return self.left + across * (WIDTH - self.left - self.right), self.top + (1 - up) * (
            self.height - self.top - self.bottom
        )

    def _share(self, value: float, low: float, high: float) -> float:
        if self.logarithmic:
            value, low, high = log(value), log(low), log(high)
        return (value - low) / ((high - low) or 1)

    def line(self, points: list[tuple[float, float]], kind: str = "line") -> str:
        """Points joined."""
        path = "L".join("{:.1f} {:.1f}".format(*self.place(*point)) for point in points)
        return f'<path d="M{path}" class="{kind}"/>'

    def texts(self, across: str, up: str) -> list[str]:
        """The least and the greatest value on either axis, and what they are of."""
        end, low = WIDTH - self.right, self.height - self.bottom
        return [
            f'<text x="{self.left - 8}" y="{self.top + 4}" text-anchor="end" class="small">{_short(self.y[1])}</text>',
            f'<text x="{self.left - 8}" y="{low + 4}" text-anchor="end" class="small">{_short(self.y[0])}</text>',
            f'<text x="{self.left}" y="{low + 18}" class="small">{_short(self.x[0])}</text>',
            f'<text x="{end}" y="{low + 18}" text-anchor="end" class="small">{_short(self.x[1])}</text>',
            f'<text x="{(self.left + end) / 2}" y="{self.height - 6}" text-anchor="middle" class="small">{escape(across)}</text>',
            f'<text x="{self.left}" y="12" class="small">{escape(up)}</text>',
        ]


def _short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.2g}"


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
