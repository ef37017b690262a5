"""`tuner caption`: bad pictures, wrong listings, options without effect, models that say odd things."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tuner.captioning.captioner import Captioner
from tuner.captioning.journal import Journal
from tuner.data.captions import CaptionRule

pytestmark = pytest.mark.usefixtures("alone")


def test_lines_of_a_listing_that_name_nothing(
    captioners: ModuleType, blips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    captioners.picture("mine/0.png", 0)
    captioners.picture("outside.png", 1)
    wrong = [
        '{"file_name": "../outside.png", "text": "a"}',
        '{"file_name": "gone.png", "text": "a"}',
        "{",
        "3",
    ]
    Path("mine/metadata.jsonl").write_text("\n".join(['{"file_name": "0.png", "text": 7}', *wrong]) + "\n")
    captioners.picture("mine/1.png", 2)
    assert captioners.run("mine", "--model", blips["blip"], "--out", "out", "--longest", 6) == 2
    err = capsys.readouterr().err.splitlines()
    wanted = [f"mine/metadata.jsonl:{number}: " for number in (2, 3, 4, 5)] + ["mine/0.png: "]
    assert len(err) == 5
    assert all(sum(line.startswith(start) for line in err) == 1 for start in wanted)
    assert "leaves the folder" in "\n".join(err) and "expected text, a caption" in err[-1]
    assert [line["file_name"] for line in captioners.lines("out/metadata.jsonl")] == ["1.png"]


def test_a_models_text_is_never_more_than_text(
    captioners: ModuleType,
    blips: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evil = "[bold red]{} {0} %s\x1b[2J {a|b}</s> \u202e \n\n{{x}}"
    monkeypatch.setattr(Captioner, "_inputs", lambda self, pictures: ({"pixel_values": None}, ""))
    monkeypatch.setattr(Captioner, "__init__", _hollow(evil))
    assert captioners.run(captioners.beside(1), "--model", blips["blip"], "--out", "out") == 0
    clean = "[bold red]{} {0} %s[2J {a|b}</s> {{x}}"
    (sample,) = captioners.opened("out")
    assert sample.captions[0] == clean
    rule = CaptionRule("first", ("see {} here",), drop=0.0)
    assert rule(sample.captions, 0, 0, 0) == f"see {clean} here"
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "[bold 100%" in shown or "bold 100%" in shown


def _hollow(text: str) -> Callable[..., None]:
    """A captioner whose network says this text."""

    class Words:
        def batch_decode(self, tokens: Any, skip_special_tokens: bool) -> list[str]:
            return [text]

    class Network:
        def generate(self, **how: Any) -> None:
            return None

    def made(self: Any, model: Any, how: Any, dtype: Any, device: Any) -> None:
        self.model, self.how, self.dtype, self.device = model, how, dtype, device
        self._network, self._words, self._processor = Network(), Words(), None

    return made


@pytest.mark.parametrize(
    "words, wanted",
    [
        ([], "expected --model, --filter or both"),
        (["--filter", "x", "--beams", 2], "--beams has no effect without --model"),
        (["--filter", "x", "--kind", "y"], "--kind has no effect without --model"),
        (["--filter", "x", "--dtype", "fp32"], "--dtype has no effect without --model"),
        (["--model", "x", "--threshold", 0.3], "--threshold has no effect without --filter"),
        (["--model", "x", "--filter-revision", "y"], "--filter-revision has no effect without --filter"),
        (["--filter", "x", "--threshold", 0.3, "--share", 0.5], "expected one of them"),
        (["--model", "x", "--top-p", 0.9, "--beams", 2], "--beams has no effect beside --top-p"),
        (["--model", "x", "--seed", 2], "--seed has no effect without --top-p"),
        (["--model", "x", "--top-p", 1.5], "--top-p: found 1.5, expected above 0, at most 1"),
        (["--model", "x", "--beams", 0], "--beams: found 0, expected at least 1"),
        (["--model", "x", "--longest", 3, "--shortest", 4], "--shortest: found 4, expected 0 to --longest 3"),
        (["--filter", "x", "--share", 0], "--share: found 0.0, expected above 0, at most 1"),
        (["--model", "x", "--batch", 0], "--batch: found 0, expected at least 1"),
        (["--model", "x", "--device", "cpuu"], "--device cpuu: cannot be used here"),
        (["--model", "x", "--dtype", "fp8"], "--dtype fp8: expected bf16, fp16, fp32"),
        (["--model", "x", "--condition-from", "../e/"], "--condition-from ../e/: expected a folder in mine"),
        (["--filter", "embedded"], "CLIP similarity has no usual threshold; give --threshold, or --share"),
        (["--model", "x", "--out", "mine/out"], "--out mine/out: expected a folder that is not in mine"),
        (["--model", "x", "--out", "full"], "--out full: not empty, and not made by tuner caption"),
    ],
)
def test_options(
    captioners: ModuleType,
    words: list[Any],
    wanted: str,
    blips: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    captioners.beside(2)
    Path("full").mkdir()
    Path("full/mine.txt").write_text("kept")
    words = [
        blips["blip"] if word == "x" and words[at - 1] == "--model" else word for at, word in enumerate(words)
    ]
    assert captioners.run("mine", *([] if "--out" in words else ["--out", "out"]), *words) == 2
    assert wanted in capsys.readouterr().err
    assert not Path("out/metadata.jsonl").exists() and Path("full/mine.txt").read_text() == "kept"


def test_kinds_do_not_mix(
    captioners: ModuleType, blips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", blips["blip"], "--longest", 6]
    assert captioners.run(captioners.beside(2), *words, "--out", "out") == 0
    assert captioners.run("out", *words, "--out", "again") == 2
    assert "has captions of kind new already" in capsys.readouterr().err
    assert captioners.run("out", *words, "--out", "again", "--kind", "second", "--shortest", 3) == 0
    kinds = {kind for sample in captioners.opened("again") for kind in sample.kinds}
    assert kinds == {"second", "new", "original"}


def test_two_at_once_do_not_mix(
    captioners: ModuleType, blips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with Journal(Path("out")):
        assert captioners.run(captioners.beside(2), "--model", blips["blip"], "--out", "out") == 2
    assert "another tuner caption is writing to it" in capsys.readouterr().err


def test_a_users_file_is_not_linked_over(
    captioners: ModuleType, blips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [captioners.beside(2), "--model", blips["blip"], "--longest", 6, "--out", "out"]
    assert captioners.run(*words) == 0
    os.unlink("out/0.png")
    Path("out/0.png").write_text("mine")
    assert captioners.run(*words) == 2
    assert "out/0.png: cannot be linked to" in capsys.readouterr().err
    assert Path("out/0.png").read_text() == "mine"
