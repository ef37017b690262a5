"""Which caption a sample gets."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.data.captions import CaptionRule

THREE = ("one", "two", "three")


@given(
    choose=st.sampled_from(["any", "first"]),
    templates=st.sampled_from([(), ("a photo of {}",), ("{} here", "a {}", "{}")]),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
    replace=st.sampled_from([(), (("two", "<x>"),), (("one", "<x>"), ("<x>", "<x> <x>_1"))]),
    position=st.integers(0, 100),
)
def test_every_lists_all_that_can_come_out(
    choose: str, templates: tuple[str, ...], drop: float, replace: tuple[tuple[str, str], ...], position: int
) -> None:
    rule = CaptionRule(choose, templates, "the ", drop, replace)
    assert rule(THREE, 1, 0, position) in rule.every(THREE)


def test_all_that_is_listed_comes_out() -> None:
    rule = CaptionRule("any", ("a {}", "the {}"), "", 0.2)
    seen = {rule(THREE, 1, 0, position) for position in range(500)}
    assert seen == rule.every(THREE) and len(seen) == 7


@pytest.mark.parametrize("drop", [0.1, 0.5])
def test_captions_are_dropped_and_chosen_at_their_rates(drop: float) -> None:
    count = 4000
    seen = Counter(CaptionRule(drop=drop)(THREE, 1, 0, position) for position in range(count))
    # Five standard deviations of a binomial share.
    assert abs(seen[""] / count - drop) < 5 * (drop * (1 - drop) / count) ** 0.5
    share = (1 - drop) / 3
    for caption in THREE:
        assert abs(seen[caption] / count - share) < 5 * (share * (1 - share) / count) ** 0.5


def test_first_takes_the_first_and_no_drop_drops_nothing() -> None:
    rule = CaptionRule(choose="first")
    assert {rule(THREE, 1, 0, position) for position in range(50)} == {"one"}
    assert {CaptionRule(drop=1.0)(THREE, 1, 0, position) for position in range(50)} == {""}


@pytest.mark.parametrize(
    ("caption", "one_row", "two_rows"),
    [
        ("a toy", "a <toy>", "a <toy> <toy>_1"),
        ("a <toy>", "a <toy>", "a <toy> <toy>_1"),
        ("toys, toy.", "toys, <toy>.", "toys, <toy> <toy>_1."),
        ("toy_1 mytoy toy", "toy_1 mytoy <toy>", "toy_1 mytoy <toy> <toy>_1"),
        ("nothing", "nothing", "nothing"),
        ("", "", ""),
    ],
)
def test_words_are_replaced_once_however_often_it_is_done(caption: str, one_row: str, two_rows: str) -> None:
    for rows, expected in (
        ((("toy", "<toy>"),), one_row),
        ((("toy", "<toy>"), ("<toy>", "<toy> <toy>_1")), two_rows),
    ):
        rule = CaptionRule(replace=rows)
        assert rule.final(caption) == expected
        assert rule.final(expected) == expected


def test_a_replacement_is_taken_literally() -> None:
    assert CaptionRule(replace=(("a.b", r"\1\g<0>"),)).final("a.b axb") == r"\1\g<0> axb"
