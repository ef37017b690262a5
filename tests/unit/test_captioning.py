"""`tuner caption` from a folder to a folder that a recipe reads, with tiny BLIP and CLIP models."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tuner.captioning import capfilt, figures
from tuner.captioning.captioner import Captioner
from tuner.captioning.keeping import least
from tuner.captioning.matching import ClipSimilarity
from tuner.data.captions import CaptionRule

pytestmark = pytest.mark.usefixtures("alone")

MADE = {".captions.jsonl", "metadata.jsonl", "scores.jsonl", "statistics.json", "left_out.jsonl"}


@pytest.fixture
def captioned(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what is asked of captioner and filter; `stop` ends the captioner after so many batches."""
    seen: Counter[str] = Counter()
    write, score = Captioner.__call__, ClipSimilarity.__call__

    def writing(self: Captioner, pictures: Any, names: Sequence[str]) -> list[str]:
        seen["batches"] += 1
        if seen["batches"] == seen["stop"]:
            raise KeyboardInterrupt
        seen["captions"] += len(names)
        return write(self, pictures, names)

    def scoring(self: ClipSimilarity, pictures: Any, texts: Sequence[str], of: Any) -> Any:
        seen["scores"] += len(texts)
        return score(self, pictures, texts, of)

    monkeypatch.setattr(Captioner, "__call__", writing)
    monkeypatch.setattr(ClipSimilarity, "__call__", scoring)
    return seen


def test_a_recipe_reads_it_at_once_and_the_folder_stays(
    captioners: ModuleType, blips: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = captioners.beside()
    before = captioners.content(folder)
    assert captioners.run(folder, "--model", blips["blip"], "--out", "out", "--longest", 6, "--batch", 4) == 0
    assert captioners.content(folder) == before
    assert {path.name for path in Path("out").iterdir()} == MADE | {"0.png", "2.png", "4.png", "deep"}
    samples = captioners.opened("out")
    assert [sample.picture.name for sample in samples] == [
        f"out/{name}" for name in ("0.png", "2.png", "4.png", "deep/1.png", "deep/3.png", "deep/5.png")
    ]
    new = {}
    for sample in samples:
        index = int(Path(sample.picture.name).stem)
        assert sample.picture.read() == before[f"{'deep/' * (index % 2)}{index}.png"]
        by_kind = dict(zip(sample.kinds, sample.captions, strict=True))
        assert by_kind.get("original") == (None if index % 2 else f"a red circle {index}")
        new[index] = by_kind.get("new", "")
    assert len(set(new.values())) > 3
    told = json.loads(Path("out/statistics.json").read_text())
    assert told["new"]["count"] == sum(map(bool, new.values())) and told["original"]["count"] == 3
    assert (told["pictures"], told["unusable"], told["least_score"]) == (6, 0, None)
    shown = capsys.readouterr().out
    assert "original: 3 captions, 3 kept; 3 different among the kept\n  first words: a 100%\n" in shown
    assert "  words: 1-5: 3; mean 4.0\n" in shown


def test_weights_choose_between_new_and_original(captioners: ModuleType, blips: dict[str, Path]) -> None:
    assert (
        captioners.run(
            captioners.beside(1), "--model", blips["blip"], "--out", "out", "--longest", 6, "--kind", "blip"
        )
        == 0
    )
    (sample,) = captioners.opened("out")
    assert sample.kinds == ("blip", "original")
    rule = CaptionRule({"blip": 95.0, "original": 5.0})
    drawn = Counter(rule(sample.captions, 0, epoch, 0, sample.kinds) for epoch in range(2000))
    assert set(drawn) == set(sample.captions) and 0.03 < drawn["a red circle 0"] / 2000 < 0.07


def test_a_listing_keeps_its_other_fields_and_its_kinds(
    captioners: ModuleType, blips: dict[str, Path]
) -> None:
    for index in range(4):
        captioners.picture(f"mine/{index}.png", index)
    captioners.picture("mine/sub/5.png", 5)
    captioners.picture("mine/edge.png", 6)
    first = [
        {
            "file_name": "0.png",
            "text": {"long": "a large red circle", "short": ["circle", "red"]},
            "weight": 2.0,
        },
        {"file_name": "1.png", "text": "a square", "conditioning_image": "edge.png", "author": "me"},
        {"file_name": "2.png"},
    ]
    Path("mine/metadata.jsonl").write_text("".join(json.dumps(one) + "\n" for one in first))
    Path("mine/sub/metadata.csv").write_text('file_name,text,weight\n5.png,"blue, small",0.5\n')
    assert captioners.run("mine", "--model", blips["blip"], "--out", "out", "--longest", 6) == 0
    samples = {sample.picture.name: sample for sample in captioners.opened("out")}
    assert sorted(samples) == [f"out/{name}" for name in ("0.png", "1.png", "2.png", "3.png", "sub/5.png")]
    zero, one, five = (samples[f"out/{name}"] for name in ("0.png", "1.png", "sub/5.png"))
    assert zero.kinds == ("new", "long", "short", "short") and zero.weight == 2.0
    assert zero.captions[1:] == ("a large red circle", "circle", "red")
    assert one.condition is not None and one.condition.name == "out/edge.png"
    assert (five.kinds[-1], five.captions[-1], five.weight) == ("original", "blue, small", 0.5)
    assert samples["out/3.png"].kinds == ("new",) == samples["out/2.png"].kinds
    assert captioners.lines("out/metadata.jsonl")[1]["author"] == "me"


def test_conditions_by_place_get_no_captions(captioners: ModuleType, blips: dict[str, Path]) -> None:
    for index in range(2):
        captioners.picture(f"mine/{index}.png", index)
        captioners.picture(f"mine/edges/{index}.png", 9 + index)
    words = ["mine", "--model", blips["blip"], "--longest", 6, "--condition-from", "edges/"]
    assert captioners.run(*words, "--out", "out") == 0
    samples = captioners.opened("out", condition_from="edges/")
    assert [sample.condition and sample.condition.name for sample in samples] == [
        "out/edges/0.png",
        "out/edges/1.png",
    ]


def test_scenes_keep_their_captions_records(captioners: ModuleType, blips: dict[str, Path]) -> None:
    from tuner.evaluate.captions import Named
    from tuner.evaluate.measures import caption_of

    captioners.picture("mine/0.png", 0)
    named = [
        {"objects": [{"shape": "circle"}], "whole": True},
        {"objects": [{"colour": "red"}], "whole": True},
    ]
    records = [{"form": form, "named": one} for form, one in zip(("long", "short"), named, strict=True)]
    line = {
        "file_name": "0.png",
        "text": ["a circle", "red"],
        "scene": {"background": "white", "captions": records},
    }
    Path("mine/metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert captioners.run("mine", "--model", blips["blip"], "--out", "out", "--longest", 6) == 0
    (sample,) = captioners.opened("out")
    assert sample.kinds == ("new", "long", "short")
    assert caption_of(sample, "long") == ("a circle", Named.from_json(named[0]))
    assert caption_of(sample, "short") == ("red", Named.from_json(named[1]))
    assert caption_of(sample, "new") == (sample.captions[0], Named(whole=False))


def test_old_and_new_captions_are_filtered(
    captioners: ModuleType,
    blips: dict[str, Path],
    captioned: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        captioners.beside(),
        "--model",
        blips["blip"],
        "--filter",
        blips["clip"],
        "--longest",
        6,
        "--out",
        "out",
    ]
    assert captioners.run(*words, "--share", 0.5) == 0
    every = [one for line in captioners.lines("out/scores.jsonl") for one in line["captions"]]
    assert len(every) == captioned["scores"] >= 7 and {one["kind"] for one in every} == {"new", "original"}
    scores = sorted((one["score"] for one in every), reverse=True)
    limit = scores[(len(scores) + 1) // 2 - 1]
    assert [one["kept"] for one in every] == [one["score"] >= limit for one in every]
    kept = {one["text"] for one in every if one["kept"]}
    samples = captioners.opened("out")
    assert {text for sample in samples for text in sample.captions} == kept
    told = json.loads(Path("out/statistics.json").read_text())
    assert told["least_score"] == limit
    assert told["new"]["rejected"] + told["original"]["rejected"] == sum(not one["kept"] for one in every)
    assert "rejected (" in capsys.readouterr().out
    gone = captioners.lines("out/left_out.jsonl")
    assert len(gone) == told["left_without_caption"] == 6 - len(samples) > 0
    assert all("captions are rejected; the best score is" in line["reason"] for line in gone)
    assert not any(Path("out", line["file_name"]).exists() for line in gone)
    # Another threshold asks nothing anew, and takes links away or brings them back.
    asked = captioned["scores"], captioned["captions"]
    assert captioners.run(*words, "--threshold", -1) == 0
    assert len(captioners.opened("out")) == 6 and captioners.lines("out/left_out.jsonl") == []
    assert captioners.run(*words, "--threshold", 2) == 0
    assert not list(Path("out").rglob("*.png")) and len(captioners.lines("out/left_out.jsonl")) == 6
    assert not Path("out/metadata.jsonl").exists()
    assert (captioned["scores"], captioned["captions"]) == asked


def test_itm_has_a_usual_threshold_and_filters_alone(captioners: ModuleType, blips: dict[str, Path]) -> None:
    assert captioners.run(captioners.beside(), "--filter", blips["blip_itm"], "--out", "out") == 0
    every = [one for line in captioners.lines("out/scores.jsonl") for one in line["captions"]]
    assert len(every) == 3 and all(one["kept"] == (one["score"] >= 0.5) for one in every)
    reasons = {line["file_name"]: line["reason"] for line in captioners.lines("out/left_out.jsonl")}
    assert reasons["deep/1.png"] == "no caption: it has none, and none was made"


@pytest.mark.parametrize("more", [(), ("--top-p", 0.9, "--seed", 3)])
def test_a_run_that_was_stopped_goes_on(
    captioners: ModuleType, blips: dict[str, Path], captioned: Counter[str], more: tuple[Any, ...]
) -> None:
    folder = captioners.beside(7)
    words = [
        folder,
        "--model",
        blips["blip"],
        "--filter",
        blips["clip"],
        "--share",
        0.7,
        "--batch",
        2,
        *more,
    ]
    assert captioners.run(*words, "--longest", 6, "--out", "whole") == 0
    assert captioned["captions"] == 7
    captioned.clear()
    captioned["stop"] = 3
    assert captioners.run(*words, "--longest", 6, "--out", "out") == 130
    with Path("out/.captions.jsonl").open("a") as file:
        file.write('["torn')  # as a kill in the middle of a write leaves it
    captioned["stop"] = 0
    assert captioners.run(*words, "--longest", 6, "--out", "out") == 0
    assert captioned["captions"] == 7, "four before, three behind"
    names = (MADE - {"statistics.json"}) | {"statistics.json"}
    same = [
        name for name in sorted(names) if Path("out", name).read_bytes() == Path("whole", name).read_bytes()
    ]
    assert same == sorted(MADE)


def test_what_changed_is_captioned_anew(
    captioners: ModuleType, blips: dict[str, Path], captioned: Counter[str]
) -> None:
    folder = captioners.beside(4)
    words = [folder, "--model", blips["blip"], "--out", "out"]
    assert captioners.run(*words, "--longest", 6) == 0 and captioned["captions"] == 4
    assert captioners.run(*words, "--longest", 6) == 0 and captioned["captions"] == 4
    captioners.picture("mine/0.png", 77)
    assert captioners.run(*words, "--longest", 6) == 0 and captioned["captions"] == 5
    assert captioners.run(*words, "--longest", 5) == 0 and captioned["captions"] == 9
    assert (
        captioners.run(*words, "--longest", 5, "--prompt", "a photo of") == 0 and captioned["captions"] == 13
    )
    other = Path(shutil.copytree(blips["blip"], "other"))
    config = other / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 1.5}))
    assert (
        captioners.run(folder, "--model", other, "--out", "out", "--longest", 6) == 0
        and captioned["captions"] == 17
    )
    (folder / "0.png").rename(folder / "renamed.png")
    shutil.copy(folder / "2.png", folder / "twin.png")
    assert captioners.run(*words, "--longest", 6) == 0 and captioned["captions"] == 17
    names = {line["file_name"]: line["text"] for line in captioners.lines("out/metadata.jsonl")}
    assert sorted(names) == ["2.png", "deep/1.png", "deep/3.png", "renamed.png", "twin.png"]
    assert names["twin.png"]["new"] == names["2.png"]["new"] and not Path("out/0.png").is_symlink()


def test_the_batch_size_changes_nothing(captioners: ModuleType, blips: dict[str, Path]) -> None:
    words = [captioners.beside(5), "--model", blips["blip"], "--longest", 6]
    for batch in (1, 3):
        assert captioners.run(*words, "--batch", batch, "--out", f"out{batch}") == 0
    assert captioners.lines("out1/metadata.jsonl") == captioners.lines("out3/metadata.jsonl") != []


def test_bad_pictures_are_listed_and_the_rest_is_done(
    captioners: ModuleType,
    blips: dict[str, Path],
    captioned: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = captioners.beside(4)
    (folder / "a.png").write_bytes((folder / "0.png").read_bytes()[:60])
    # An equal one is not tried again, and listed all the same.
    shutil.copy(folder / "a.png", folder / "b.png")
    captioners.picture("mine/c.png", 9)
    Path("mine/c.txt").write_bytes(b"\xff\xfe caf\xe9")
    captioners.picture("mine/d.png", 10)
    Path("mine/d.txt").write_text("one")
    Path("mine/d.caption").write_text("two")
    words = [folder, "--model", blips["blip"], "--filter", blips["clip"], "--share", 1, "--longest", 6]
    for again in (0, 1):
        assert captioners.run(*words, "--out", "out") == 2
        told = capsys.readouterr()
        assert "Traceback" not in told.err and len(told.err.splitlines()) == 4
        for start, why in zip(
            told.err.splitlines(), ("cut off", "cut off", "UTF-8", "several captions"), strict=True
        ):
            assert why in start
        assert [line.split(":")[0] for line in told.err.splitlines()] == [f"mine/{c}.png" for c in "abcd"]
        assert [line["file_name"] for line in captioners.lines("out/left_out.jsonl")] == [
            "a.png",
            "b.png",
            "c.png",
            "d.png",
        ]
        assert len(captioners.opened("out")) == 4 and captioned["captions"] == 4, again
    assert json.loads(Path("out/statistics.json").read_text())["unusable"] == 4


@pytest.mark.parametrize(
    "share, wanted", [(1.0, 0.1), (0.1, 0.9), (0.3, 0.8), (0.31, 0.7), (0.2, 0.8), (0.75, 0.2)]
)
def test_a_share_is_rounded_up_and_ties_are_kept(share: float, wanted: float) -> None:
    scores = [0.9, 0.8, 0.8, 0.7, 0.5, 0.3, 0.2, 0.2, 0.1, 0.1]
    assert least(scores, None, share) == wanted
    assert least(list(reversed(scores)), None, share) == wanted
    assert least(scores, 0.4, None) == 0.4 and least([], None, share) == 0.0


def test_figures_count() -> None:
    from tuner.captioning.keeping import Picture, Scored
    from tuner.captioning.originals import Found, Said

    def of(new: bool, text: str, score: float, kept: bool) -> Scored:
        return Scored(Said("new" if new else "original", text), new, score, kept)

    pictures = [
        Picture(Found("a"), (of(True, "A red circle.", 0.9, True), of(False, "a dog", 0.1, False))),
        Picture(
            Found("b"),
            (of(True, "a red circle.", 0.8, True), of(False, '"The" cat sits on the mat', 0.7, True)),
        ),
        Picture(Found("c"), (of(True, "the sea", 0.2, False),)),
    ]
    told = figures.figures(pictures, 2, 0.5)
    assert (told["pictures"], told["unusable"], told["left_without_caption"]) == (5, 2, 1)
    new, old = told["new"], told["original"]
    assert (new["count"], new["kept"], new["rejected"], new["different"]) == (3, 2, 1, 2)
    assert new["reject_rate"] == pytest.approx(1 / 3) and new["first_words"] == {"a": 2}
    assert new["words"] == {"mean": 3.0, "histogram": {"3": 2}}
    assert old["first_words"] == {"the": 1} and old["words"]["histogram"] == {"6": 1}
    assert (new["scores"]["min"], new["scores"]["median"], new["scores"]["max"]) == (0.2, 0.8, 0.9)
    assert (
        sum(number for _, number in new["scores"]["histogram"]) == 3 and len(new["scores"]["histogram"]) == 20
    )
    shown = figures.lines(told)
    assert shown[0] == "5 pictures, 2 that cannot be used, 1 left without a caption"
    assert shown[1].startswith(
        "new: 3 captions, 2 kept, 1 rejected (33.3%); scores 0.200 to 0.900, median 0.800"
    )
    assert shown[5:] == ["  first words: the 100%", "  words: 6-10: 1; mean 6.0"]


def test_pictures_are_decoded_a_little_ahead() -> None:
    from concurrent.futures import ThreadPoolExecutor

    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return item * item

    with ThreadPoolExecutor(1) as pool:
        taken = capfilt._ahead(pool, work, range(100), 4)
        assert [next(taken) for _ in range(3)] == [(0, 0), (1, 1), (2, 4)]
        assert len(begun) <= 3 + 4
        assert list(taken) == [(i, i * i) for i in range(3, 100)]
    assert begun == list(range(100))
