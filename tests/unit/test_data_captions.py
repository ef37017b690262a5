"""Which caption a sample gets."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuner.data.captions import MANY, CaptionRule, joined
from tuner.data.tags import TagRule
from tuner.errors import UserError

THREE = ("one", "two", "three")
WORDS = (("toy", "<toy>"), ("<toy>", "<toy> <toy>_1"))
OPERATORS = ("choose", "wildcards", "tag dropout", "tag shuffle", "template", "trigger", "prefix", "suffix")

tag_rules = st.builds(
    TagRule,
    keep=st.integers(0, 2),
    marker=st.sampled_from([None, "|||"]),
    together=st.sampled_from([None, ";;"]),
    shuffle=st.booleans(),
    drop=st.sampled_from([0.0, 0.4, 1.0]),
)
rules = st.builds(
    CaptionRule,
    choose=st.sampled_from(["any", "first", (0.0, 2.0, 1.0), {"long": 95.0, "short": 5.0}]),
    templates=st.sampled_from([(), ("a photo of {}",), ("{} here", "a {}", "{}")]),
    prefix=st.sampled_from(["", "the "]),
    drop=st.sampled_from([0.0, 0.3, 1.0]),
    replace=st.sampled_from([(), (("two", "<x>"),), (("one", "<x>"), ("<x>", "<x> <x>_1"))]),
    suffix=st.sampled_from(["", ", fine"]),
    trigger=st.sampled_from([None, "sks", "two"]),
    wildcards=st.sampled_from(["keep", "draw", "first"]),
    tags=st.none() | tag_rules,
)
pieces = st.lists(st.sampled_from(["one", "two", ", ", ",", "|||", ";;", "{", "|", "}", "{a|b}"]), max_size=9)
texts = pieces.map("".join)


def test_what_rules_of_old_make_is_as_it_was() -> None:
    """Texts of rules as they were before operators were added; a run's captions must not change."""
    captions = ("a red toy", "toy, blue, {x|y}", "three")
    made = [
        CaptionRule(),
        CaptionRule("first"),
        CaptionRule("any", ("a {}", "the {} here"), "p: ", 0.1),
        CaptionRule(drop=0.5),
        CaptionRule("any", (), "", 0.0, WORDS),
    ]
    places = [(seed, epoch, at) for seed in (0, 7) for epoch in (0, 3) for at in range(40)]
    out = [rule(captions[:n], *place) for rule in made for n in (1, 3) for place in places]
    assert len(out) == 1600 and digest(out).startswith("81c179b33b6129d2925a2c9850dd4798ac523e593cdc7036")
    every = [sorted(rule.every(captions) or ()) for rule in made]
    assert digest(every).startswith("1f9ea779413279ad80ba8e893027ad12c33c0c6c527cc278")


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def test_what_new_operators_draw_stays() -> None:
    rule = CaptionRule(
        {"long": 3.0, "short": 1.0}, (), wildcards="draw", tags=TagRule(shuffle=True, drop=0.3, keep=1)
    )
    captions, kinds = ("a, b, c, {d|e{f|g}}", "h, i, j"), ("long", "short")
    assert [rule(captions, 1, 2, position, kinds) for position in range(6)] == [
        "h, j",
        "a, b, c",
        "a, d, c",
        "a, ef, c",
        "h, j, i",
        "h, i, j",
    ]


@given(rule=rules, captions=st.tuples(texts, texts, texts), position=st.integers(0, 100))
@example(CaptionRule(tags=TagRule(shuffle=True, drop=0.4)), ("a, b, c", "", "d"), 3)
def test_every_has_what_comes_out_and_the_trace_tells_how(
    rule: CaptionRule, captions: tuple[str, ...], position: int
) -> None:
    kinds = ("short", "long", "short")
    text = rule(captions, 1, 0, position, kinds)
    every = rule.every(captions, kinds)
    assert every is None or (text in every and len(every) <= MANY)
    assert rule(captions, 1, 0, position, kinds) == text
    assert pickle.loads(pickle.dumps(rule))(captions, 1, 0, position, kinds) == text
    trace = rule.trace(captions, 1, 0, position, kinds)
    assert trace[-1][1] == text
    if trace == [("caption dropout", "")]:
        assert rule.drop > 0
        return
    on = {
        "choose": True,
        "wildcards": rule.wildcards != "keep",
        "tag dropout": rule.tags is not None and rule.tags.drop > 0,
        "tag shuffle": rule.tags is not None and rule.tags.shuffle,
        "template": bool(rule.templates),
        "trigger": rule.trigger is not None,
        "prefix": bool(rule.prefix),
        "suffix": bool(rule.suffix),
        "tags": rule.tags is not None and not rule.tags.shuffle and not rule.tags.drop,
        "new words": bool(rule.replace),
    }
    names = [name for name, _ in trace]
    assert sorted(names) == sorted(name for name, is_on in on.items() if is_on)
    assert [name for name in names if name in OPERATORS] == [name for name in OPERATORS if on[name]]


@given(rule=rules, captions=st.tuples(texts, texts, texts), ends=st.booleans())
def test_extremes_are_some_of_every_and_all_of_it_where_tags_do_not_move(
    rule: CaptionRule, captions: tuple[str, ...], ends: bool
) -> None:
    kinds = ("short", "long", "short")
    extremes, every = rule.extremes(captions, kinds, ends), rule.every(captions, kinds)
    assert extremes and (every is None or extremes <= every)
    if rule.tags is None:
        assert extremes == every
    elif every is not None:
        assert max(map(len, extremes)) == max(map(len, every))
        assert min(map(len, extremes)) == min(map(len, every))
        words = {word for text in every for word in text.split()}
        always = {word for word in words if all(word in text for text in every)}
        assert always == {word for word in words if all(word in text for text in extremes)}


@given(rule=rules, captions=st.tuples(texts, texts), position=st.integers(0, 9))
def test_a_plain_rule_draws_nothing(rule: CaptionRule, captions: tuple[str, str], position: int) -> None:
    plain = rule.plain()
    (text,) = plain.every(captions) or ()
    assert plain(captions, 1, 0, position) == text == plain(captions, 2, 3, 5)
    assert plain.plain() == plain
    assert text.startswith((rule.prefix, "<")) and all(
        name != "template" for name, _ in trace(plain, captions)
    )


def trace(rule: CaptionRule, captions: tuple[str, ...]) -> list[tuple[str, str]]:
    return rule.trace(captions, 0, 0, 0)


def test_all_that_is_listed_comes_out() -> None:
    rule = CaptionRule("any", ("a {}", "the {}"), "", 0.2)
    seen = {rule(THREE, 1, 0, position) for position in range(500)}
    assert seen == rule.every(THREE) and len(seen) == 7
    rule = CaptionRule(wildcards="draw", tags=TagRule(shuffle=True, drop=0.5, keep=1))
    seen = {rule(("a, {b|c}, d",), 1, 0, position) for position in range(500)}
    assert seen == rule.every(("a, {b|c}, d",)) and len(seen) == 8


def test_every_operator_is_shown_in_its_order() -> None:
    rule = CaptionRule(
        "any",
        ("a photo of {}",),
        "best, ",
        0.0,
        (("toy", "<toy>"),),
        ", on a table",
        "sks",
        "draw",
        TagRule(keep=1, shuffle=True, drop=1e-9),
    )
    assert rule.trace(("toy, {red|red}, big",), 1, 0, 6) == [
        ("choose", "toy, {red|red}, big"),
        ("wildcards", "toy, red, big"),
        ("tag dropout", "toy, red, big"),
        ("tag shuffle", "toy, big, red"),
        ("template", "a photo of toy, big, red"),
        ("trigger", "sks, a photo of toy, big, red"),
        ("prefix", "best, sks, a photo of toy, big, red"),
        ("suffix", "best, sks, a photo of toy, big, red, on a table"),
        ("new words", "best, sks, a photo of <toy>, big, red, on a table"),
    ]


@pytest.mark.parametrize(
    ("caption", "made"),
    [("a dog", "sks, a dog"), ("a sks dog", "a sks dog"), ("sksy", "sks, sksy"), ("", "sks")],
)
def test_a_trigger_is_put_where_it_is_not(caption: str, made: str) -> None:
    assert CaptionRule(trigger="sks")((caption,), 0, 0, 0) == made


@pytest.mark.parametrize("drop", [0.1, 0.5])
def test_captions_are_dropped_and_chosen_at_their_rates(drop: float) -> None:
    count = 4000
    seen = Counter(CaptionRule(drop=drop)(THREE, 1, 0, position) for position in range(count))
    # Five standard deviations of a binomial share.
    assert abs(seen[""] / count - drop) < 5 * (drop * (1 - drop) / count) ** 0.5
    share = (1 - drop) / 3
    for caption in THREE:
        assert abs(seen[caption] / count - share) < 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize(
    ("choose", "kinds", "shares"),
    [
        ({"long": 95.0, "short": 5.0}, ("short", "long", "alt"), (0.05, 0.95, 0.0)),
        ({"long": 60.0, "short": 40.0}, ("short", "long", "short"), (0.2, 0.6, 0.2)),
        ({"long": 1.0, "short": 4.0}, ("alt", "long", "alt"), (0.0, 1.0, 0.0)),
        ((8.0, 2.0), (), (0.8, 0.2, 0.0)),
        ((1.0, 0.0, 1.0, 2.0), (), (0.5, 0.0, 0.5)),
    ],
)
def test_weights_are_kept(
    choose: dict[str, float] | tuple[float, ...], kinds: tuple[str, ...], shares: tuple[float, ...]
) -> None:
    rule, count = CaptionRule(choose), 4000
    seen = Counter(rule(THREE, 1, 0, position, kinds) for position in range(count))
    assert rule.every(THREE, kinds) == {c for c, share in zip(THREE, shares, strict=True) if share}
    for caption, share in zip(THREE, shares, strict=True):
        assert abs(seen[caption] / count - share) <= 5 * (share * (1 - share) / count) ** 0.5


@pytest.mark.parametrize(
    ("rule", "captions", "kinds", "problem"),
    [
        (CaptionRule(), (), (), "expected a caption, found none"),
        (CaptionRule(), ("a",), ("b", "c"), "expected a kind for each of 1 captions, found 2"),
        (
            CaptionRule((0.0, 1.0)),
            ("a",),
            (),
            "found 1 captions, of which none has a weight above 0",
        ),
        (
            CaptionRule({"long": 1.0, "tiny": 0.0}),
            ("a", "b"),
            ("tiny", "short"),
            "expected a caption of kind long, found tiny, short",
        ),
        (
            CaptionRule({"long": 1.0, "short": 2.0}),
            ("a",),
            (),
            "expected a caption of kind long, short, found captions without kinds",
        ),
    ],
)
def test_a_sample_of_which_nothing_can_be_chosen(
    rule: CaptionRule, captions: tuple[str, ...], kinds: tuple[str, ...], problem: str
) -> None:
    assert rule.problem(captions, kinds) == problem
    for call in (rule.every, rule.extremes, lambda c, k: rule(c, 0, 0, 0, k)):
        with pytest.raises(UserError, match=problem):
            call(captions, kinds)


def test_too_many_are_not_listed() -> None:
    tags = ", ".join(str(i) for i in range(40))
    assert CaptionRule(tags=TagRule(shuffle=True)).every((tags,)) is None
    many = " ".join(["{a|b}"] * 100)
    assert CaptionRule(wildcards="draw").every((many,)) is None
    assert len(CaptionRule(wildcards="draw").extremes((many,))) <= 202
    assert len(CaptionRule(wildcards="draw").every((" ".join(["{a|b}"] * 12),)) or ()) == MANY == 2**12


def test_what_may_come_is_joined_up_to_a_limit() -> None:
    assert joined([{"a", "b"}, {"b", "c"}], 3) == {"a", "b", "c"}
    assert joined([], 0) == set()
    looked = []
    for found in ([{"a", "b"}, {"c"}, {"d"}], [{"a"}, None, {"d"}]):
        assert joined((looked.append(one) or one for one in found), 2) is None  # type: ignore[func-returns-value]
    assert looked == [{"a", "b"}, {"c"}, {"a"}, None]


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
