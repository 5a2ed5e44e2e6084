"""Plots as SVG: a bar for each ratio, and how a training step grows. Needs the standard library alone."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

if __package__:
    from .words import duration, times
else:  # report.py run as a script
    from words import duration, times

INK, GRID, PAPER = "#3f4752", "#d9dde3", "#fff"
WON, LOST = "#15803d", "#c2410c"

# ----------------------------------------------------------------------------------------------------------------- bars

BAR, GAP, BARS, TOP, MARGIN, LETTER = 15, 5, 340, 60, 60, 6.3  # pixels; a letter is that wide in most fonts
SHORTEST, LONGEST = 0.1, 100.0  # ratios beyond are drawn as these, with their own number


def bars(device: str, ratios: Sequence[tuple[str, float]]) -> str:
    """A bar for each (label, ratio): times as fast as the best peer, on a logarithmic scale around 1."""
    drawn = [min(max(ratio, SHORTEST), LONGEST) for _, ratio in ratios]
    labels = round(max((len(label) for label, _ in ratios), default=0) * LETTER) + 16
    low, high = math.log(min([0.5, *drawn])), math.log(max([2.0, *drawn]))

    def x(ratio: float) -> float:
        return round(labels + (math.log(ratio) - low) / (high - low) * BARS, 1)

    height = TOP + len(ratios) * (BAR + GAP)
    parts = head(labels + BARS + MARGIN, height, f"{device}: time of the best peer over ours, above 1 we are faster")
    for tick in (tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= math.log(tick) <= high):
        stroke = INK if tick == 1 else GRID
        parts.append(f'<line x1="{x(tick)}" x2="{x(tick)}" y1="46" y2="{height - 4}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x(tick)}" y="42" text-anchor="middle">{tick:g}x</text>')
    for number, ((label, ratio), length) in enumerate(zip(ratios, drawn, strict=True)):
        top, (start, stop) = TOP - 8 + number * (BAR + GAP), sorted((x(1), x(length)))
        colour, wide = WON if ratio >= 1 else LOST, max(stop - start, 0.5)
        parts.append(f'<text x="{labels - 8}" y="{top + 12}" text-anchor="end">{html.escape(label)}</text>')
        parts.append(f'<rect x="{start}" y="{top}" width="{wide:.1f}" height="{BAR}" fill="{colour}"/>')
        parts.append(f'<text x="{stop + 4:.1f}" y="{top + 12}">{times(ratio)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def head(width: int, height: int, text: str) -> list[str]:
    """The beginning of a picture, with its title."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11" fill="{INK}">',
        f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        f'<text x="10" y="22" font-size="14">{html.escape(text)}</text>',
    ]


# --------------------------------------------------------------------------------------------------------------- growth

Curve = Sequence[tuple[float, float]]  # (what grows, seconds)
PANEL, TALL, LEFT, APART, ABOVE, BELOW = 230, 220, 70, 80, 70, 50  # pixels
COLOURS = (WON, LOST, "#1d4ed8", "#6d28d9")
ROOM = 1.15  # around the outermost points


def growth(device: str, panels: Mapping[str, Mapping[str, Curve]]) -> str:
    """A panel for each thing that grows with a curve for each contender, both axes logarithmic, seconds alike in all."""
    seconds = [s for curves in panels.values() for curve in curves.values() for _, s in curve]
    low, high = min(seconds) / ROOM, max(seconds) * ROOM
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    bottom = ABOVE + TALL
    parts = head(LEFT + len(panels) * (PANEL + APART), bottom + BELOW, f"{device}: time of a training step")
    for number, name in enumerate(names):
        x = LEFT + 190 * number
        parts.append(f'<rect x="{x}" y="34" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(f'<text x="{x + 15}" y="43">{html.escape(name)}</text>')

    def y(value: float) -> float:
        return round(bottom - _place(value, low, high) * TALL, 1)

    for number, (axis, curves) in enumerate(panels.items()):
        left = LEFT + number * (PANEL + APART)
        values = sorted({value for curve in curves.values() for value, _ in curve})
        first, last = values[0] / ROOM, values[-1] * ROOM

        def x(value: float, left: int = left, first: float = first, last: float = last) -> float:
            return round(left + _place(value, first, last) * PANEL, 1)

        for tick in _ticks(low, high):
            parts.append(f'<line x1="{left}" x2="{left + PANEL}" y1="{y(tick)}" y2="{y(tick)}" stroke="{GRID}"/>')
            parts.append(f'<text x="{left - 6}" y="{y(tick) + 4}" text-anchor="end">{duration(tick)}</text>')
        for value in values:
            parts.append(f'<line x1="{x(value)}" x2="{x(value)}" y1="{ABOVE}" y2="{bottom}" stroke="{GRID}"/>')
            parts.append(f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle">{_count(value)}</text>')
        parts.append(f'<text x="{left + PANEL / 2}" y="{bottom + 36}" text-anchor="middle">{html.escape(axis)}</text>')
        for name, curve in curves.items():
            placed = [(x(value), y(s)) for value, s in sorted(curve)]
            line = " ".join(f"{across},{up}" for across, up in placed)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
            parts += [f'<circle cx="{a}" cy="{b}" r="3" fill="{colours[name]}"/>' for a, b in placed]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _place(value: float, low: float, high: float) -> float:
    """0 at `low`, 1 at `high`, logarithmic between."""
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]


def _count(value: float) -> str:
    return f"{value / 1e6:.0f} M" if value >= 1e6 else f"{value:g}"
