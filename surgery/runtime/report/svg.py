"""Plots as inline SVG: lines over steps, and heat maps. Colours are classes, so that a page decides light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from surgery.runtime.report.markup import Markup, join, tag
from surgery.runtime.report.metrics import Series

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 30
POINTS = 400  # of a drawn line: what lies between two of them is kept as its smallest and its largest value
MARKED = 25  # a series of no more values has a dot for each, which says its value
CELL, ROW, WIDE_CELL = 18, 24, 46
NUMBERED = 24  # columns of a heat map that has room for numbers in its cells


@dataclass(frozen=True)
class Axis:
    """A range of values on a line of pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (math.log(part) if self.logarithmic else part for part in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round values in the range, about `count` of them."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            found = [10.0**power for power in range(first, last + 1, max(1, (last - first) // count))]
            return found if len(found) > 1 else [self.low, self.high]
        unit = 10.0 ** math.floor(math.log10((self.high - self.low) / count))
        step = min(
            (unit * factor for factor in (1, 2, 5, 10)), key=lambda size: abs((self.high - self.low) / size - count)
        )
        first = math.ceil(self.low / step - 1e-9)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A value in three digits: `0.0123`, `1.2e-05`, `1,240`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def line_chart(title: str, lines: Sequence[Series], steps: int = 0) -> Markup:
    """Lines over `steps` steps or more, each with the class of its number; values that are not finite are left out."""
    drawn = [(line, _finite(line)) for line in lines]
    points = [point for _, found in drawn for point in found]
    label = f"{title}: {', '.join(f'{line.name} ends at {number(line.last)}' for line in lines)}"
    if not points:
        return tag("p", "no finite value", class_="none")
    x = Axis(*_spread([0, steps - 1, *(step for step, _ in points)]), LEFT, WIDTH - RIGHT)
    y = _vertical([value for _, value in points])
    parts = [_grid(x, y)]
    for place, (line, found) in enumerate(drawn):
        tone = f"tone{place % 8}"
        mean = running_mean(found)
        parts.append(_path(x, y, thinned(found), f"line {tone}" + (" faint" if mean else "")))
        if mean:
            parts.append(_path(x, y, thinned(mean), f"line {tone}"))
        if len(found) <= MARKED:
            parts += [_dot(x, y, line.name, step, value, tone) for step, value in found]
    return tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def running_mean(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean of the last fiftieth of a noisy line's values; nothing for a line that is smooth, or short."""
    values = [value for _, value in points]
    travelled = sum(abs(after - before) for before, after in zip(values, values[1:], strict=False))
    width = window(len(values))
    if not width or travelled <= 4 * (max(values) - min(values)):
        return []
    found, total = [], 0.0
    for place, (step, value) in enumerate(points):
        total += value - (values[place - width] if place >= width else 0.0)
        found.append((step, total / min(place + 1, width)))
    return found


def window(count: int) -> int:
    """Of how many values the running mean of a line of `count` is; 0 for a line too short to have one."""
    return max(5, count // 50) if count >= 40 else 0


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """No more than `POINTS` points that look the same: of every stretch its smallest and its largest value."""
    if len(points) <= POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / POINTS)
    found: list[tuple[int, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        found += sorted(ends)
    return found


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: dict[tuple[str, str], float]) -> Markup:
    """A cell for each value, `values[row, column]`, darker for larger ones; 0 is no colour."""
    finite = [value for value in values.values() if math.isfinite(value)]
    largest = max(finite, default=0.0)
    numbered = len(columns) <= NUMBERED
    cell = WIDE_CELL if numbered else CELL
    deepest = 0.62 if numbered else 1.0  # numbers stay readable on it, in light and dark
    left = 14 + 6.6 * max(map(len, rows))
    parts: list[str] = []
    for across, column in enumerate(columns):
        if numbered or across % 5 == 0:
            middle = left + (across + 0.5) * cell
            parts.append(tag("text", column, x=f"{middle:.1f}", y=14, class_="tick middle"))
    for down, row in enumerate(rows):
        top = 22 + down * ROW
        parts.append(tag("text", row, x=f"{left - 8:.1f}", y=top + 16, class_="tick end"))
        for across, column in enumerate(columns):
            value = values.get((row, column))
            if value is None:
                continue
            place = {"x": f"{left + across * cell + 1:.1f}", "y": top + 1, "width": cell - 2, "height": ROW - 2}
            share = value / largest if largest > 0 and math.isfinite(value) else 0.0
            opacity = 0.05 + max(share, 0.0) * (deepest - 0.05)
            said = tag("title", f"{row}, {column}: {number(value)}")
            parts.append(tag("rect", said, **place, rx=3, class_="cell", fill_opacity=f"{opacity:.3f}"))
            if numbered:
                middle = left + (across + 0.5) * cell
                parts.append(tag("text", number(value), x=f"{middle:.1f}", y=top + 16, class_="number"))
    width, height = math.ceil(left + cell * len(columns) + 4), 26 + ROW * len(rows)
    label = f"{title}, up to {number(largest)}"
    return tag("svg", *parts, width=width, height=height, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def _finite(line: Series) -> list[tuple[int, float]]:
    return [point for point in zip(line.steps, line.values, strict=True) if math.isfinite(point[1])]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, apart."""
    low, high = min(values), max(values)
    return (
        (low, high)
        if high - low > 1e-12 * max(abs(low), abs(high))
        else (low - (abs(low) or 1), high + (abs(high) or 1))
    )


def _vertical(values: Sequence[float]) -> Axis:
    """The axis of values: logarithmic where a few dwarf all others, as the first step of a compiled model does."""
    low, high = _spread(values)
    if low > 0 and high > 20 * median(values):
        return Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic=True)
    margin = 0.05 * (high - low)
    bottom = low - margin if low < 0 or low > margin else 0.0
    return Axis(bottom, high + margin, HEIGHT - BOTTOM, TOP)


def _grid(x: Axis, y: Axis) -> Markup:
    parts: list[str] = []
    for value in y.ticks(4):
        at = f"{y(value):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", number(value), x=LEFT - 7, y=f"{y(value) + 4:.1f}", class_="tick end"))
    for value in x.ticks(4):
        if value == int(value) and value >= 0:
            parts.append(tag("text", f"{value:,.0f}", x=f"{x(value):.1f}", y=HEIGHT - 10, class_="tick middle"))
    return join(parts)


def _path(x: Axis, y: Axis, points: Sequence[tuple[int, float]], name: str) -> Markup:
    corners = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
    return tag("path", d=f"M{corners}", class_=name)


def _dot(x: Axis, y: Axis, name: str, step: int, value: float, tone: str) -> Markup:
    said = tag("title", f"{name} at step {step:,}: {number(value)}")
    return tag("circle", said, cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r=2.6, class_=f"dot {tone}")
