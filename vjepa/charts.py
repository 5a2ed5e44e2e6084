"""Line charts as inline SVG: crisp at any size, no plotting library, and coloured by the page's style sheet.

A chart takes its colours from the CSS classes `axis`, `grid`, `tick`, `line0`..`line5` and `band0`..`band5` of the
page that holds it (`STYLE` defines them for light and dark), so that one file is readable in both.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 460, 270  # the view box; text of 13 units stays readable when a phone scales it down
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 14, 46  # LEFT grows where the labels of the y axis are long
DIGIT_WIDTH = 8  # of the 13-unit font, at most
MAX_POINTS = 300  # more points are averaged in bins, with a band from the smallest to the largest of each bin
COLOURS = 6

STYLE = """
:root { --line0: #0b62c4; --line1: #c2410c; --line2: #15803d; --line3: #8b2fb0; --line4: #8a6d00; --line5: #0e7490;
  --axis: #6b7280; --grid: #e3e6ea; --tick: #3f4752; }
@media (prefers-color-scheme: dark) { :root { --line0: #6cb0ff; --line1: #ff9a5c; --line2: #5fd38a; --line3: #d69bf0;
  --line4: #e6c84a; --line5: #57cfe6; --axis: #8b94a1; --grid: #30363f; --tick: #c3cad4; } }
.chart { width: 100%; height: auto; display: block; font: 13px system-ui, sans-serif; }
.chart .axis { stroke: var(--axis); stroke-width: 1; } .chart .grid { stroke: var(--grid); stroke-width: 1; }
.chart text { fill: var(--tick); }
.chart polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.chart polygon { opacity: 0.18; stroke: none; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; border-radius: 2px; margin: 0 0.35em -0.05em 0; }
""" + "\n".join(
    f".chart .line{i} {{ stroke: var(--line{i}); }} .chart .band{i}, .chart .dot{i} {{ fill: var(--line{i}); }} "
    f".swatch{i} {{ background: var(--line{i}); }}"
    for i in range(COLOURS)
)


@dataclass(frozen=True)
class Series:
    """One line: y over x, equally long; points whose y is not finite break the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(series: Sequence[Series], *, x_label: str, y_label: str, description: str) -> str:
    """An <svg> element with axes, ticks, labels and one line per series. `description` is what a screen reader says.

    Raises ValueError where no point is finite or a series' x and y differ in length.
    """
    for one in series:
        if len(one.x) != len(one.y):
            raise ValueError(f"series {one.name!r}: expected as many x as y, got {len(one.x)} and {len(one.y)}")
    runs = [[_binned(run) for run in _finite_runs(one)] for one in series]
    points = [point for lines in runs for run in lines for point in run]
    if not points:
        raise ValueError(f"series: expected at least one finite point, got none in {[one.name for one in series]}")
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    if 0 < x_low < 0.1 * x_high:
        x_low = 0.0  # steps count from 1 and are logged every few: the axis still starts where the run does
    x_ticks = ticks(x_low, x_high, 5)
    y_ticks = ticks(min(p[2] for p in points), max(p[3] for p in points), 5)
    y_low, y_high = min(y_ticks[0], min(p[2] for p in points)), max(y_ticks[-1], max(p[3] for p in points))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    y_labels = tick_labels(y_ticks)
    left = max(LEFT, 34 + DIGIT_WIDTH * max(map(len, y_labels)))

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x_low) / (x_high - x_low) * (WIDTH - left - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(description)}">']
    for value, text in zip(y_ticks, y_labels, strict=True):
        y = place(x_low, value)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 7}" y="{y + 4.5:.1f}" text-anchor="end">{text}</text>')
    base = HEIGHT - BOTTOM
    for value, text in zip(x_ticks, tick_labels(x_ticks), strict=True):
        if not x_low <= value <= x_high:
            continue
        x = place(value, y_low)[0]
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (TOP + base) / 2
    parts.append(
        f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">'
        f"{html.escape(y_label)}</text>"
    )
    for number, (one, lines) in enumerate(zip(series, runs, strict=True)):
        parts += [_draw(run, number % COLOURS, one.name, place) for run in lines]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that cover low..high, a flat one widened."""
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        half = abs(high) * 0.1 or 0.5
        low, high = low - half, high + half
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Short texts for evenly spaced ticks, with just as many digits as tell them apart: 0.25, 1500, 15k, 2e-4."""
    step = abs(values[1] - values[0]) if len(values) > 1 else 1.0
    largest = max(abs(value) for value in values)
    if largest >= 10_000 and step >= 100:
        digits = 0 if step >= 1000 else 1
        return [f"{value / 1000:.{digits}f}k" if value else "0" for value in values]
    if largest < 1e-3:
        digits = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9))
        texts = [f"{value:.{digits}e}".replace("e-0", "e-") for value in values]
        return ["0" if abs(value) < step / 2 else text for value, text in zip(values, texts, strict=True)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:.{digits}f}" for value in values]


_Point = tuple[float, float, float, float]  # x, mean y, smallest y, largest y of a bin


def _finite_runs(series: Series) -> list[list[tuple[float, float]]]:
    """The series cut where y is not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if math.isfinite(y):
            runs[-1].append((float(x), float(y)))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _binned(run: Sequence[tuple[float, float]]) -> list[_Point]:
    size = -(-len(run) // MAX_POINTS)
    bins = [run[start : start + size] for start in range(0, len(run), size)]
    return [
        (
            sum(x for x, _ in part) / len(part),
            sum(y for _, y in part) / len(part),
            min(y for _, y in part),
            max(y for _, y in part),
        )
        for part in bins
    ]


def _draw(run: Sequence[_Point], colour: int, name: str, place: Callable[[float, float], tuple[float, float]]) -> str:
    centre = [place(x, mean) for x, mean, _, _ in run]
    title = f"<title>{html.escape(name)}</title>"
    if len(centre) == 1:
        return f'<circle class="dot{colour}" cx="{centre[0][0]}" cy="{centre[0][1]}" r="3">{title}</circle>'
    line = f'<polyline class="line{colour}" points="{_path(centre)}">{title}</polyline>'
    if all(low == high for _, _, low, high in run):
        return line
    edge = [place(x, low) for x, _, low, _ in run] + [place(x, high) for x, _, _, high in reversed(run)]
    return f'<polygon class="band{colour}" points="{_path(edge)}"/>{line}'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
