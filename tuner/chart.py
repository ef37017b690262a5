"""Line charts over optimiser steps, as the coordinates and texts that an SVG is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Points = Sequence[tuple[int, float]]

WIDTH, HEIGHT = 440, 220  # of a chart, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 16, 26  # margins around its plot
MOST_POINTS = 600  # drawn of one line; more would not be seen


@dataclass(frozen=True)
class Chart:
    """One line chart, ready to be drawn: everything in SVG units or as text."""

    title: str
    unit: str
    latest: str
    raw: str
    """Path of the values."""
    smooth: str
    """Path of their smoothed course; empty where there are too few."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, str, str]]
    """(x, its number, what happened)"""
    note: str


def line_chart(
    title: str,
    unit: str,
    points: Points,
    last: int,
    events: Sequence[tuple[int, str]] = (),
    smooth: bool = False,
) -> Chart:
    """A line over optimiser steps 0 to `last` (or to the last point, where that is later).

    Values that are not finite leave a gap. A smoothed line is drawn over 20 or more values; single
    spikes among them (outside the 2nd to the 98th percentile) may then leave the plot.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    course = smoothed(points, max(3, len(points) // 25)) if smooth and len(finite) >= 20 else []
    low, high = _range(finite, course)
    y_ticks = ticks(low, high, 4)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    end = max([last, 1] + [step for step, _ in points])
    steps = [tick for tick in ticks(0, end, 5) if tick <= end and tick == int(tick)]

    def x(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * step / end, 1)

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    def path(line: Points) -> str:
        runs: list[list[str]] = [[]]
        for step, value in _thin(line):
            if math.isfinite(value):
                runs[-1].append(f"{x(step):g} {y(value):g}")
            else:
                runs.append([])
        # a lone value is drawn as a dot: a line of no length with round ends
        return " ".join("M" + " L".join(run) + ("h0" if len(run) == 1 else "") for run in runs if run)

    notes = {
        "not finite": len(points) - len(finite),
        "beyond the axis": sum(not low <= value <= high for _, value in finite),
    }
    shown = course or points
    return Chart(
        title=title,
        unit=unit,
        latest=number(shown[-1][1]) if shown else "",
        raw=path(points),
        smooth=path(course),
        x_ticks=[(x(tick), f"{int(tick):,}") for tick in steps],
        y_ticks=[(y(tick), _tick_text(tick, y_ticks)) for tick in y_ticks],
        marks=[(x(step), str(place), text) for place, (step, text) in enumerate(events, 1) if step <= end],
        note=", ".join(f"{count} of {len(points)} values {where}" for where, count in notes.items() if count),
    )


def _range(finite: Points, course: Points) -> tuple[float, float]:
    """The lowest and highest value that a line chart shows."""
    values = sorted(value for _, value in finite)
    if course:
        cut = len(values) // 50
        values = sorted(values[cut : len(values) - cut] + [value for _, value in course])
    low, high = (values[0], values[-1]) if values else (0.0, 1.0)
    if high - low <= 1e-9 * abs(high):
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    if 0 < low < 0.3 * high:
        low = 0.0  # near enough to show where nothing is
    return low, high


def smoothed(points: Points, span: int) -> list[tuple[int, float]]:
    """An exponential mean over about `span` values, without bias towards 0; non-finite ones are left out."""
    keep, total, weight = 1 - 2 / (span + 1), 0.0, 0.0
    course = []
    for step, value in points:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            course.append((step, total / weight))
    return course


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose low to high; `about` of them."""
    assert low < high, (low, high)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, final = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{place * step:.12g}") for place in range(first, final + 1)]


def _tick_text(value: float, all_ticks: Sequence[float]) -> str:
    """A tick with as many decimals as its axis needs."""
    step, size = all_ticks[1] - all_ticks[0], max(abs(tick) for tick in all_ticks)
    if size < 0.001 or size >= 1e6:
        return number(value)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{digits}f}"


def _thin(points: Points) -> Points:
    """At most MOST_POINTS of the points: of each stretch the lowest and the highest, and every gap."""
    if len(points) <= MOST_POINTS:
        return points
    length = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[tuple[int, float]] = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        finite = [point for point in stretch if math.isfinite(point[1])]
        gap = [point for point in stretch if not math.isfinite(point[1])][:1]
        finite.sort(key=lambda point: point[1])
        kept += sorted({*finite[:1], *finite[-1:], *gap}, key=lambda point: point[0])
    return kept


def number(value: float) -> str:
    """A number as people read it: 1,500, 33.1, 0.0812, 1e-4, nan."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = abs(value)
    if size < 0.001 or size >= 1e6:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = 4 if size < 0.1 else 3 if size < 10 else 1 if size < 1000 else 0
    return f"{value:,.{digits}f}"
