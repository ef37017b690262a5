"""What is said of captions before a run: those that are cut, and those that a method cannot learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tuner import base
from tuner.data import caption_check
from tuner.data.blob import File
from tuner.data.cache import Hashes
from tuner.data.captions import CaptionRule
from tuner.data.samples import Sample
from tuner.data.tags import TagRule
from tuner.errors import UserError
from tuner.family import Options
from tuner.text import Tokens

ONE = {"token": "<a>", "init": "red"}
Make = Callable[..., Any]
TAGS = ", ".join(["red"] * 37)  # 73 tokens, so that one more with its comma is the last that fits


@pytest.fixture
def make(make_method: Callable[..., Any]) -> Make:
    """The method on a fresh tiny base, which it keeps as `family`."""
    return lambda **config: make_method("textual_inversion", **config)


@pytest.fixture
def load(folders: dict[str, Path], tmp_path: Path) -> Any:
    """A fresh tiny base by name that reads some windows."""

    def fresh(name: str, windows: int = 1) -> Any:
        options = Options(windows=windows)
        return base.load(str(folders[name]), None, (), ("text_encoder",), 0, Hashes(tmp_path), options)

    return fresh


def samples(*captions: str) -> list[Sample]:
    return [Sample(File(Path(f"{i}.png")), (one,)) for i, one in enumerate(captions)]


def check(method: Any, rule: CaptionRule, *captions: str) -> str | None:
    tokenize = method.family.tokenize
    return caption_check.check(samples(*captions), rule, [method], tokenize, method.family.options.windows)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_captions_that_are_cut_are_listed_longest_first(load: Any, name: str) -> None:
    captions = {"", "red " * 40, "t " * 75, "t " * 76, "u " * 200}  # `red` is one token of four bytes
    told = {}
    for windows in (1, 2, 3):
        found = caption_check.cuts(captions, load(name, windows).tokenize, windows)
        told[windows] = [(cut.caption, cut.over) for cut in found]
    assert told == {1: [("u " * 200, 125), ("t " * 76, 1)], 2: [("u " * 200, 50)], 3: []}
    found = caption_check.cuts(captions, load(name).tokenize, 1)
    assert caption_check.told(found, 1) == (
        "2 captions have more than 75 tokens and are cut; base.windows: 3 reads them all\n"
        f"  the last 125 of {('u ' * 30)!r}...\n"
        f"  the last 1 of {('t ' * 30)!r}..."
    )
    found = [caption_check.Cut("x", over) for over in range(30, 0, -1)]
    lines = caption_check.told(found, 2).split("\n")
    assert lines[0].endswith("base.windows: 3 reads them all") and lines[0].startswith("30 captions have")
    assert len(lines) == 1 + caption_check.SHOWN + 1 and lines[-1] == "  ... and 20 more"


def test_many_captions_are_tokenised_in_parts(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_check, "AT_ONCE", 2)
    sizes, tokenize = [], load("sd1").tokenize

    def counting(captions: Sequence[str]) -> Tokens:
        sizes.append(len(captions))
        made: Tokens = tokenize(captions)
        return made

    long = [f"{'u ' * 80}{'v ' * i}" for i in range(5)]
    found = caption_check.cuts(long, counting, 1)
    assert [cut.over for cut in found] == [9, 8, 7, 6, 5] and sizes == [2, 2, 1]


@pytest.mark.parametrize("gap", [" ", ", ", ",", "\n"])
def test_what_is_read_of_a_caption_is_its_longest_beginning_that_fits(load: Any, gap: str) -> None:
    family = load("sd1")
    caption = gap.join(["red", "toy", "b", "!"] * 40)
    found = caption_check.read(caption, family.tokenize)
    assert caption.startswith(found) and len(found) < len(caption)
    inner = family.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
    assert family.tokenizer(found, add_special_tokens=False)["input_ids"] == inner[:75]
    assert caption_check.read("a red toy", family.tokenize) == "a red toy"


def test_a_method_without_wishes_hears_of_cut_captions_only(make_method: Any) -> None:
    lora = make_method("lora")
    assert check(lora, CaptionRule(drop=0.5), "a", "b") is None
    line = check(lora, CaptionRule(tags=TagRule(shuffle=True, drop=0.5)), TAGS + ", a, b", "c")
    assert line is not None and line.startswith("1 captions have more than 75 tokens and are cut;")
    assert caption_check.check(samples("u " * 99), CaptionRule(), [lora], None, 1) is None


def test_a_word_that_may_be_missing_stops_the_run(make: Make) -> None:
    method = make(**ONE)
    assert check(method, CaptionRule(), "<a> here", "my <a>, red") is None
    assert check(method, CaptionRule(tags=TagRule(keep=1, drop=0.5, shuffle=True)), "<a>, red, b") is None
    for rule, caption, missing in (
        (CaptionRule(), "red", "red"),
        (CaptionRule(drop=0.1), "<a>", ""),
        (CaptionRule(tags=TagRule(keep=1, drop=0.1)), "red, <a>", "red"),
        (CaptionRule(wildcards="draw"), "{my <a>|red}", "red"),
        (CaptionRule(wildcards="draw"), " ".join(["{<a>|red}"] * 20), " ".join(["red"] * 20)),
    ):
        with pytest.raises(UserError, match="captions lack the token that is to be learned") as caught:
            check(method, rule, "<a>", caption)
        assert f"\n  {missing!r}" in str(caught.value)
    with pytest.raises(UserError) as caught:
        check(method, CaptionRule(), *(f"red {i}" for i in range(30)))
    assert str(caught.value).startswith("30 of 30 captions lack") and str(caught.value).count("\n") == 11


def test_a_word_behind_the_cut_stops_the_run(make: Make) -> None:
    method = make(**ONE)
    assert check(method, CaptionRule(), f"{TAGS}, <a>") is None
    cut = f"{TAGS}, b, <a>"
    with pytest.raises(UserError, match="1 of 2 captions are cut before the token") as caught:
        check(method, CaptionRule(), "<a>", cut)
    assert f"\n  {cut!r}" in str(caught.value)
    line = check(method, CaptionRule(), f"<a>, {TAGS}, b")
    assert line is not None and line.startswith("1 captions have more than 75 tokens")
    # In front it is read, but a shuffle may bring it behind all others; where it is kept in front it may not.
    with pytest.raises(UserError, match="captions are cut before the token"):
        check(method, CaptionRule(tags=TagRule(shuffle=True)), f"<a>, {TAGS}, b")
    line = check(method, CaptionRule(tags=TagRule(shuffle=True, keep=1)), f"<a>, {TAGS}, b")
    assert line is not None and "captions have more than 75 tokens" in line


def test_samples_of_which_nothing_can_be_chosen_are_told_by_name(make_method: Any) -> None:
    rule = CaptionRule({"long": 1.0})
    with pytest.raises(UserError) as caught:
        check(make_method("lora"), rule, "a", "b")
    assert str(caught.value) == (
        "2 of 2 samples have no usable caption:\n"
        "  0.png: expected a caption of kind long, found captions without kinds\n"
        "  1.png: expected a caption of kind long, found captions without kinds"
    )
