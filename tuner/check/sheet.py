"""The contact sheet: one page with the first samples as the model gets them, and what the data is like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tuner import page
from tuner.chart import number
from tuner.check.findings import Findings
from tuner.check.inputs import Shown

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 440, 170, 8, 26, 16
"""Of a histogram and its margins, in SVG units."""


class Bar(NamedTuple):
    """One bar of a histogram, in SVG units, and what it says."""

    x: float
    y: float
    width: float
    height: float
    text: str


class Histogram(NamedTuple):
    """Bars, ready to be drawn."""

    title: str
    bars: list[Bar]
    low: str
    high: str
    most: str


def write(path: Path, name: str, shown: Sequence[Shown], found: Findings) -> Path:
    """Write the page, whole.

    Args:
        name: of the recipe.
        shown: the first samples.
        found: of the whole check.
    """
    return page.write(path, Path(__file__).with_name("sheet.html.j2"), _contents(name, shown, found))


def _contents(name: str, shown: Sequence[Shown], found: Findings) -> dict[str, Any]:
    facts = found.facts
    captions, sizes = facts.get("captions", {}), facts.get("sizes", {})
    histograms = [
        histogram(f"Captions' lengths in {captions.get('unit')}", captions.get("histogram", [])),
        histogram(
            "Pictures' sizes: the side of a square of the same area, in pixels", sizes.get("histogram", [])
        ),
    ]
    return {
        "name": name,
        "samples": shown,
        "problems": found.problems,
        "unchecked": found.unchecked,
        "notes": found.notes,
        "buckets": facts.get("buckets", []),
        "captions": captions,
        "sizes": sizes,
        "summary": _summary(facts),
        "histograms": [one for one in histograms if one.bars],
        "box": {"width": WIDTH, "height": HEIGHT, "bottom": HEIGHT - BOTTOM, "left": LEFT},
    }


def _summary(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the head of the page says."""
    recipe, base, plan = (facts.get(key, {}) for key in ("recipe", "base", "plan"))
    told = {
        "Method": " + ".join(recipe.get("method", [])),
        "Base": base.get("title"),
        "Data": ", ".join(source["path"] for source in facts.get("data", {}).get("sources", [])),
        "Samples": plan.get("samples"),
        "Steps": plan.get("steps"),
        "Epochs": plan.get("epochs"),
        "Batch size": plan.get("batch_size"),
    }
    return [(key, number(v) if isinstance(v, (int, float)) else str(v)) for key, v in told.items() if v]


def histogram(title: str, rows: Sequence[Sequence[int]]) -> Histogram:
    """Bars of [from, to, how many] rows, side by side over the whole width."""
    if not rows:
        return Histogram(title, [], "", "", "")
    most = max(count for _, _, count in rows)
    room, tall = WIDTH - 2 * LEFT, HEIGHT - TOP - BOTTOM
    wide = room / len(rows)
    bars = []
    for place, (low, high, count) in enumerate(rows):
        height = round(tall * count / most, 1)
        where = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        x = round(LEFT + place * wide, 1)
        bars.append(
            Bar(
                x,
                round(HEIGHT - BOTTOM - height, 1),
                round(max(wide - 1.5, 1), 1),
                height,
                f"{where}: {count:,}",
            )
        )
    return Histogram(title, bars, f"{rows[0][0]:,}", f"{rows[-1][1]:,}", f"{most:,}")
