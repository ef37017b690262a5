"""The recipe's block of captions: its mistakes, and the rule that it makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tuner.data.captions import CaptionRule
from tuner.data.tags import TagRule
from tuner.recipe import Recipe, RecipeError

Loader = Callable[..., Recipe]
WORDS = (("toy", "<toy>"),)


def test_without_keys_the_methods_decide(good: str, read: Loader) -> None:
    about = read(good).data.captions
    assert about.rule((), 0.1, ()) == CaptionRule(drop=0.1)
    assert about.rule(("a {}",), 0.0, WORDS) == CaptionRule(templates=("a {}",), replace=WORDS)


def test_every_key_becomes_part_of_the_rule(good: str, read: Loader) -> None:
    overrides = {
        "drop": "0.2",
        "prefix": "'p '",
        "suffix": "' s'",
        "templates": "['my {}', 'a {}']",
        "choose": "{long: 95, short: 5}",
        "wildcards": "true",
        "trigger": "sks",
        "tags": "{shuffle: true, drop: 0.3, separator: ';', keep: 2, marker: '|||', together: '&&'}",
    }
    read_back = read(good, *(f"data.captions.{key}={text}" for key, text in overrides.items()))
    tags = TagRule(";", 2, "|||", "&&", True, 0.3)
    weights = {"long": 95.0, "short": 5.0}
    expected = CaptionRule(weights, ("my {}", "a {}"), "p ", 0.2, WORDS, " s", "sks", "draw", tags)
    assert read_back.data.captions.rule((), 0.1, WORDS) == expected
    assert set(overrides) == set(type(read_back.data.captions).model_fields)
    again = read(read_back.resolved_yaml())
    assert again.data.captions == read_back.data.captions and again.decisive() == read_back.decisive()
    by_place = read(good, "data.captions.choose=[95, 5]").data.captions
    assert by_place.rule((), 0.0, ()).choose == (95.0, 5.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("choose=last", "choose: found the text 'last', expected one of: any, first or a block of keys or"),
        ("choose={long: x}", "choose.long: found the text 'x', expected a number"),
        ("choose=[1, -1]", "choose.1: found the number -1, expected a number of at least 0"),
        ("choose=[0, 0]", "choose: found no weight above 0, expected one at least"),
        ("choose={}", "choose: found no weight above 0, expected one at least"),
        ("tags={}", "tags.shuffle: found neither shuffle nor drop, expected one of them"),
        ("tags={drop: 0.0, keep: 1}", "tags.shuffle: found neither shuffle nor drop, expected one of them"),
        ("tags={shufle: true}", "tags.shufle: unknown key; did you mean shuffle?"),
        ("tags={shuffle: true, keep: -1}", "tags.keep: found the number -1, expected a number of at least 0"),
        ("tags={shuffle: true, separator: ''}", "tags.separator: found the text '', expected text that is"),
        ("tags={shuffle: true, marker: ','}", "tags.marker: found ',', which is in the separator"),
        ("tags={shuffle: true, together: ',,'}", "tags.together: found ',,' beside separator ','"),
        (
            "tags={shuffle: true, marker: '||', together: '|||'}",
            "tags.together: found '|||' beside marker '||'",
        ),
        ("trigger=''", "trigger: found the text '', expected text that is not empty"),
    ],
)
def test_mistakes(good: str, read: Loader, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(good, f"data.captions.{override}")
    assert f": data.captions.{message}" in str(caught.value)


@pytest.mark.parametrize("key", ["prefix", "suffix", "trigger", "templates"])
def test_wildcards_are_for_captions_alone(good: str, read: Loader, key: str) -> None:
    text = "['a {}', 'a {red|blue} {}']" if key == "templates" else "'{red|blue} '"
    read(good, f"data.captions.{key}={text}")  # without wildcards it is text like any other
    with pytest.raises(RecipeError) as caught:
        read(good, f"data.captions.{key}={text}", "data.captions.wildcards=true")
    where = "templates.1" if key == "templates" else key
    assert f"data.captions.{where}: found a wildcard in" in str(caught.value)
    assert str(caught.value).count("found a wildcard") == 1
