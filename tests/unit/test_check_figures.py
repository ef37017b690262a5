"""What a check counts, in closed form: captions, sizes, buckets, steps, bytes; and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.check import figures, inputs, room, schedule, sheet, table
from tuner.check.findings import Findings, Problem
from tuner.data.captions import CaptionRule
from tuner.data.plan import Beside, Plan
from tuner.data.tags import TagRule
from tuner.errors import UserError
from tuner.training import Checkpoint


@given(st.lists(st.integers(-50, 5000), min_size=1, max_size=200))
def test_a_histogram_counts_each_value_once(values: list[int]) -> None:
    rows = figures.histogram(values)
    assert 1 <= len(rows) <= figures.BARS
    assert sum(count for _, _, count in rows) == len(values)
    for low, high, count in rows:
        assert count == sum(low <= value <= high for value in values)
    assert all(one[1] + 1 == other[0] for one, other in zip(rows, rows[1:], strict=False))
    assert len({high - low for low, high, _ in rows}) == 1


def test_a_spread() -> None:
    assert figures.spread([]) is None
    assert figures.spread([7]) == {"min": 7, "median": 7, "p95": 7, "max": 7}
    hundred = np.arange(1, 101)[::-1]
    assert figures.spread(hundred) == {"min": 1, "median": 50, "p95": 96, "max": 100}


def test_operators_are_told_in_their_order() -> None:
    rule = CaptionRule(
        choose={"long": 95, "short": 5},
        templates=("a {}", "the {}"),
        prefix="p ",
        drop=0.25,
        replace=(("toy", "<toy>"),),
        suffix=" s",
        trigger="word",
        wildcards="draw",
        tags=TagRule(shuffle=True, drop=0.5, keep=2),
    )
    assert figures.operators(rule) == [
        "empty instead with chance 0.25",
        "one of several by weight: long 95, short 5",
        "wildcards {a|b} are written out",
        "each tag left out with chance 0.5",
        "tags shuffled behind the first 2",
        "put into one of 2 templates",
        "'word' in front where it is missing",
        "'p ' in front",
        "' s' behind",
        "'toy' becomes '<toy>'",
    ]
    assert figures.operators(CaptionRule()) == ["one of several, each with equal chances"]


@pytest.mark.parametrize("repeats", [[1.0] * 10, [1.0, 0.5, 0.25, 3.0, 1.0, 1.0], [0.5] * 9])
@pytest.mark.parametrize("steps", [1, 3, 7, 29])
def test_pictures_seen_are_counted_one_by_one(repeats: list[float], steps: int) -> None:
    plan = Plan(repeats, 3, seed=1, last="padded")
    counted = sum(slot.weight > 0 for step in range(steps) for slot in plan.step(step))
    assert schedule.images(plan, steps) == counted
    # All cycles have as many: the sum of all repeats, as often as the cycle has epochs.
    whole = plan.steps_in(plan.cycle)
    assert schedule.images(plan, 4 * whole) == round(4 * plan.cycle * sum(repeats))


def test_class_pictures_are_seen_too() -> None:
    plan = Plan([1.0] * 8, 4, seed=1, beside=Beside(8, 3, 1.0))
    assert schedule.images(plan, 4) == 16


class Recipe(NamedTuple):
    """As much of a recipe as is looked at."""

    train: Any


class Train(NamedTuple):
    checkpoint: Checkpoint


@pytest.mark.parametrize(
    "about, expected",
    [
        ({}, (1, 1)),
        ({"every": 10}, (10, 2)),
        ({"every": 30, "keep": 3}, (4, 3)),  # 30, 60, 90 and the last one
        ({"every": 10, "keep": 1, "keep_every": 50}, (10, 2)),  # 50; 100 is the last one
        ({"every": 200}, (1, 1)),
    ],
)
def test_checkpoints_are_counted(about: dict[str, int], expected: tuple[int, int]) -> None:
    recipe: Any = Recipe(Train(Checkpoint(**about)))
    assert schedule._checkpoints(recipe, 100) == dict(zip(("written", "kept"), expected, strict=True))


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (3 * 2**20 // 2, "1.5 MiB"), (5 * 2**40, "5 TiB")],
)
def test_bytes_in_words(count: int, text: str) -> None:
    assert room.size(count) == text


def test_findings_tell_each_problem_once() -> None:
    found = Findings()

    def fail() -> int:
        raise UserError("broken")

    assert found.attempt("data", fail) is None
    assert found.attempt("data", lambda: 5) == 5
    found.problem("data", "broken")
    found.problems_of("data", ["broken", "other", "other"])
    found.problem("base", "broken")
    assert found.problems == [
        Problem("data", "broken"),
        Problem("data", "other"),
        Problem("base", "broken"),
    ]
    told = found.as_json()
    assert told["ok"] is False and told["problems"][1] == {"about": "data", "text": "other"}


def test_the_table_lists_some_problems_and_counts_the_rest() -> None:
    found = Findings()
    found.problems_of("data", (f"picture {number}\nits reason" for number in range(45)))
    lines = table.lines(found)
    assert lines[0] == "45 problems"
    assert lines[1:3] == ["  data: picture 0", "    its reason"]
    assert lines[-1] == "  ... and 5 more; --json lists all"
    assert len(lines) == 1 + 2 * table.SHOWN + 1


class Words:
    """A tokeniser of single letters."""

    def __call__(self, caption: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in caption]}

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"{chr(one)}</w>" for one in ids]


@pytest.mark.parametrize("windows, length, cut", [(1, 75, 0), (1, 76, 1), (2, 76, 0), (2, 151, 1), (1, 0, 0)])
def test_tokens_are_marked_where_the_cut_is(windows: int, length: int, cut: int) -> None:
    class Options(NamedTuple):
        windows: int

    class Family:
        text_encoders = {"text_encoder": None}
        tokenizers = {"text_encoder": Words()}

        def __init__(self) -> None:
            self.options = Options(windows)

    family: Any = Family()
    pieces, found = inputs.tokens(family, "x" * length)
    assert found == cut == sum(piece.state == "cut" for piece in pieces)
    assert [piece.state for piece in pieces] == ["read"] * (length - cut) + ["cut"] * cut
    assert [n for n, piece in enumerate(pieces) if piece.begins] == [
        n for n in (75, 150) if n < min(length, 75 * windows)
    ]
    assert all(piece.text == "x" and piece.ends for piece in pieces)


def test_bars_of_a_histogram() -> None:
    made = sheet.histogram("title", [[0, 9, 5], [10, 19, 10], [20, 29, 0]])
    assert [bar.height for bar in made.bars] == [64.0, 128.0, 0.0]
    assert all(bar.y + bar.height == sheet.HEIGHT - sheet.BOTTOM for bar in made.bars)
    assert [bar.text for bar in made.bars] == ["0 to 9: 5", "10 to 19: 10", "20 to 29: 0"]
    assert made.bars[-1].x + made.bars[-1].width <= sheet.WIDTH
    assert sheet.histogram("title", []).bars == []


def test_what_is_written_into_the_page_is_escaped(tmp_path: Path) -> None:
    nasty = "<b onload='x'>&{{ 7 * 7 }}{% raw %}"
    found = Findings()
    found.problem("data", nasty)
    found.note(nasty)
    found.unchecked.append(nasty)
    found.facts["data"] = {"sources": [{"path": nasty}]}
    found.facts["captions"] = {
        "looked_at": 1,
        "empty": 0,
        "different": 1,
        "unit": "tokens",
        "length": figures.spread([3]),
        "histogram": figures.histogram([3]),
        "cut": 0,
        "first_words": [[nasty, 1]],
        "samples_with_several": 0,
        "operators": {"all": [nasty]},
    }
    picture = inputs.embedded(nasty, np.zeros((4, 4, 3), np.uint8))
    shown = inputs.Shown(nasty, [(nasty, nasty)], [picture], nasty, [(nasty, nasty)], [(nasty, nasty)], [], 0)
    text = sheet.write(tmp_path / "page.html", nasty, [shown], found).read_text(encoding="utf-8")
    assert "<b onload" not in text
    escaped = "&lt;b onload=&#39;x&#39;&gt;&amp;{{ 7 * 7 }}{% raw %}"
    assert text.count(escaped) == 18
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
