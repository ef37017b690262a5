"""Wildcards and tags of captions."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tuner.data import wildcards
from tuner.data.tags import TagRule

letters = st.text("ab{|} ", max_size=14)
tag_lists = st.lists(st.sampled_from("abcdefgh"), max_size=7)


@pytest.mark.parametrize(
    ("text", "every"),
    [
        ("a {red|blue} toy", ["a red toy", "a blue toy"]),
        ("{big |}toy", ["big toy", "toy"]),
        ("{a|b{c|d}}", ["a", "bc", "bd"]),
        ("{a|b} {c|d}", ["a c", "a d", "b c", "b d"]),
        ("{x{a|b}}", ["{xa}", "{xb}"]),
        ("{a {b|c}", ["{a b", "{a c"]),
        ("{a|b} | }", ["a | }", "b | }"]),
        ("{a|{b", ["{a|{b"]),
        (":-} {} {a} a|b {", [":-} {} {a} a|b {"]),
        ("", [""]),
    ],
)
def test_wildcards_become_their_options(text: str, every: list[str]) -> None:
    parts = wildcards.parse(text)
    assert list(wildcards.every(parts)) == every
    assert wildcards.count(parts) == len(every)
    assert set(wildcards.cover(parts)) <= set(every)


@given(text=letters)
def test_a_text_without_wildcards_is_left_as_it_is(text: str) -> None:
    parts = wildcards.parse(text)
    if all(isinstance(part, str) for part in parts):
        assert wildcards.write(parts, lambda _: 0) == text == "".join(wildcards.every(parts))
    assume(text.count("{") == 0 or text.count("}") == 0 or "|" not in text)
    assert wildcards.count(parts) == 1 and wildcards.write(parts, lambda _: 0) == text


@given(text=letters, pick=st.randoms(use_true_random=False))
def test_every_spelling_is_listed_and_each_option_is_covered(text: str, pick: object) -> None:
    parts = wildcards.parse(text)
    every = list(wildcards.every(parts))
    assert len(every) == wildcards.count(parts)
    seen: set[tuple[int, int]] = set()

    def drawn(wildcard: wildcards.Wildcard) -> int:
        number: int = pick.randrange(len(wildcard.options))  # type: ignore[attr-defined]
        assert len(wildcard.options) > 1 and text[wildcard.at] == "{"
        seen.add((wildcard.at, number))
        return number

    assert wildcards.write(parts, drawn) in every
    assert {path[at] for at, number in seen for path in wildcards._paths(parts, {}) if at in path} >= {
        number for _, number in seen
    }


def test_the_cover_has_each_option_and_the_nth_of_all_together() -> None:
    parts = wildcards.parse("{a|b|{c|d}} {a|b}")
    assert set(wildcards.cover(parts)) == {"a a", "b a", "c a", "d a", "a b", "b b"}
    many = wildcards.parse(" ".join(["{toy|cat}"] * 40))
    assert " ".join(["cat"] * 40) in set(wildcards.cover(many))


@given(tags=tag_lists, keep=st.integers(0, 3), position=st.integers(0, 1000), epoch=st.integers(0, 3))
def test_a_shuffle_is_a_permutation_that_keeps_the_first(
    tags: list[str], keep: int, position: int, epoch: int
) -> None:
    rule, text = TagRule(keep=keep, shuffle=True), ",".join(tags)
    ((name, made),) = rule.steps(text, 1, epoch, position)
    out = made.split(", ") if made else []
    assert name == "tag shuffle"
    assert Counter(out) == Counter(tags) and out[:keep] == tags[:keep]
    assert list(rule.steps(text, 1, epoch, position)) == [(name, made)]


def test_every_order_comes_equally_often() -> None:
    rule, count = TagRule(keep=1, shuffle=True), 6000
    seen = Counter(next(rule.steps("k, a, b, c", 1, 0, position))[1] for position in range(count))
    orders = {f"k, {', '.join(order)}" for order in permutations("abc")}
    assert set(seen) == orders == set(rule.every("k, a, b, c"))
    for times in seen.values():
        assert abs(times / count - 1 / 6) < 5 * (5 / 36 / count) ** 0.5


@pytest.mark.parametrize("drop", [0.1, 0.6])
def test_each_loose_tag_is_dropped_at_the_rate_and_kept_ones_never(drop: float) -> None:
    rule, count = TagRule(keep=1, drop=drop), 4000
    seen: Counter[str] = Counter()
    for position in range(count):
        ((name, text),) = rule.steps("k, a, b, c", 1, 0, position)
        assert name == "tag dropout" and text.split(", ") == sorted(text.split(", "), key="kabc".index)
        seen.update(text.split(", "))
    assert seen["k"] == count and set(seen) == set("kabc")
    for tag in "abc":
        assert abs(seen[tag] / count - (1 - drop)) < 5 * (drop * (1 - drop) / count) ** 0.5


@given(tags=st.permutations("abcdef"), position=st.integers(0, 1000))
def test_which_tags_are_dropped_does_not_depend_on_the_shuffle(tags: list[str], position: int) -> None:
    text = ", ".join(tags)
    ((_, dropped),) = TagRule(drop=0.5).steps(text, 1, 0, position)
    (_, first), (_, moved) = TagRule(drop=0.5, shuffle=True).steps(text, 1, 0, position)
    assert first == dropped and sorted(moved) == sorted(dropped)
    ((_, shuffled),) = TagRule(shuffle=True).steps(text, 1, 0, position)
    left = moved.split(", ") if moved else []
    assert [tag for tag in shuffled.split(", ") if tag in left] == left


@pytest.mark.parametrize(
    ("rule", "text", "parted", "joined"),
    [
        (TagRule(keep=1), " a ,b,, c", (["a"], ["b", "c"], []), "a, b, c"),
        (TagRule(marker="|||"), "a, b ||| c, d", (["a", "b"], ["c", "d"], []), "a, b, c, d"),
        (TagRule(marker="|||"), "a ||| c, d ||| e", (["a"], ["c", "d"], ["e"]), "a, c, d, e"),
        (TagRule(marker="|||"), "||| c ||| d ||| e", ([], ["c", "d"], ["e"]), "c, d, e"),
        (TagRule(marker="|||", keep=1), "a, b", (["a"], ["b"], []), "a, b"),
        (TagRule(separator=" | "), "a | b|c", ([], ["a", "b|c"], []), "a | b|c"),
        (TagRule(separator="."), "A b. C.", ([], ["A b", "C"], []), "A b. C"),
        (TagRule(together=";;;"), "a ;;; b, c", ([], ["a ;;; b", "c"], []), "a, b, c"),
        (TagRule(keep=9), "a", (["a"], [], []), "a"),
        (TagRule(), "", ([], [], []), ""),
    ],
)
def test_captions_are_parted_into_tags(
    rule: TagRule, text: str, parted: tuple[list[str], ...], joined: str
) -> None:
    found = rule.part(text)
    assert found == parted
    assert rule.join([*found.first, *found.loose, *found.last]) == joined
    assert list(rule.steps(text, 0, 0, 0)) == [("tags", joined)]


def test_tags_that_are_together_stay_so() -> None:
    rule = TagRule(together=";;;", shuffle=True)
    seen = {next(rule.steps("a;;;b, c, d", 1, 0, position))[1] for position in range(100)}
    assert seen == {", ".join(order) for order in permutations(["a, b", "c", "d"])}


@given(
    tags=st.lists(st.sampled_from("abcdef"), max_size=5, unique=True),
    shuffle=st.booleans(),
    drop=st.sampled_from([0.0, 0.5, 1.0]),
    keep=st.integers(0, 2),
)
def test_what_may_become_of_tags_is_counted(tags: list[str], shuffle: bool, drop: float, keep: int) -> None:
    rule, text = TagRule(keep=keep, shuffle=shuffle, drop=drop), ",".join(tags)
    every = list(rule.every(text))
    assert len(every) == len(set(every)) == rule.count(text)
    extremes = list(rule.extremes(text, ends=True))
    assert set(extremes) <= set(every) and len(extremes) == len(set(extremes)) or not tags[keep:]
    last = {text.split(", ")[-1] for text in extremes if len(text) == len(extremes[0])}
    loose = tags[keep:]
    if shuffle and drop < 1 and loose:
        assert last == set(loose)
    shortest = ", ".join(tags[:keep] if drop else tags)
    assert shortest in extremes
