"""Sets of the Hub's stand-in, and what else `datasets` loads, as sources."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tuner.data.samples import Samples
from tuner.data.sources import retry
from tuner.data.sources.opening import look, open_spec
from tuner.data.sources.spec import Columns, SourceSpec
from tuner.data.sources.stream import Stream
from tuner.errors import UserError

CODE = """
import json, os, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 500)
from tuner.data.sources.opening import open_spec
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import Stream
for given in json.loads(sys.argv[1]):
    said, answer = [], {}
    if token := given.pop("token", None):
        os.environ["HF_TOKEN"] = token
    try:
        source = open_spec(SourceSpec.model_validate(given), said.append)
        samples = list(source.epoch(0, 0) if isinstance(source, Stream) else source)
        answer["samples"] = sorted(
            [s.captions[0], s.picture.read().hex(), s.condition and s.condition.read().hex(), s.picture.name,
             s.picture.stamp()]
            for s in samples
        )
    except ValueError as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    print("ANSWER" + json.dumps(answer | {"said": said}), flush=True)
"""


def png(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


def rows(first: int, last: int) -> pa.Table:
    """Columns as fusing/fill50k has them, with one more."""
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(first, last)]
    edges = [{"bytes": png(100 + n), "path": None} for n in range(first, last)]
    texts = [f"caption {n}" for n in range(first, last)]
    return pa.table(
        {"image": cells, "conditioning_image": edges, "text": texts, "url": ["x"] * (last - first)}
    )


WHOLE = [[f"caption {n}", png(n).hex(), png(100 + n).hex()] for n in range(6)]


@pytest.fixture
def ask(hub: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Opens sources in a process for which the stand-in is the Hub, with a private Parquet set and a
    public imagefolder set; what came of each."""
    table = tmp_path / "table" / "data"
    table.mkdir(parents=True)
    for part in range(2):
        parquet.write_table(rows(3 * part, 3 * part + 3), table / f"train-{part:05d}-of-00002.parquet")
    hub.serve(tmp_path / "table", "tester/table", kind="dataset", private=True)
    folder = tmp_path / "pictures" / "train"
    folder.mkdir(parents=True)
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"caption {n}"}) for n in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    hub.serve(tmp_path / "pictures", "tester/pictures", kind="dataset")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('run!')")
    hub.serve(tmp_path / "script", "tester/script", kind="dataset")
    at = tmp_path / "cwd"
    at.mkdir()

    def run(*specs: dict[str, Any], home: str = "home", **more: Any) -> list[dict[str, Any]]:
        root = str(Path(__file__).resolve().parents[2])
        environment = hub.environment(tmp_path / home, **more) | {"PYTHONPATH": root}
        command = [sys.executable, "-c", CODE, json.dumps(specs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=at)
        answers = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("ANSWER")]
        assert done.returncode == 0 and len(answers) == len(specs), done.stderr
        return answers

    return run


def test_sets_of_both_forms_and_what_can_be_wrong(ask: Callable[..., list[dict[str, Any]]], hub: Any) -> None:
    table = {"path": "hub:tester/table"}
    told = ask(
        table,
        {"path": "hub:tester/pictures"},
        table | {"streaming": True},
        {"path": "hub:tester/pictures", "streaming": True},
        table | {"columns": {"picture": "imgae", "caption": "txt", "condition": "edges"}},
        table | {"columns": {"picture": "text", "caption": "image", "condition": "url"}},
        table | {"columns": {"caption": "txt"}, "streaming": True},
        table | {"split": "trian"},
        table | {"split": "trian", "streaming": True},
        table | {"config": "defualt"},
        table | {"revision": "v1"},
        {"path": "hub:tester/tabel"},
        {"path": "hub:tester/script"},
        table | {"split": "train[:2]"},
        table | {"split": "train[2:4]"},
    )
    assert [one[:3] for one in told[0]["samples"]] == WHOLE
    assert [one[3] for one in told[0]["samples"]] == [f"hub:tester/table train[{n}].image" for n in range(6)]
    used = "columns image (picture), text (caption), conditioning_image (condition); not used: url"
    assert told[0]["said"] == [f"hub:tester/table train: {used}"] == told[2]["said"]
    assert [one[:3] for one in told[1]["samples"]] == [[*one[:2], None] for one in WHOLE[:3]]
    assert [one[:3] for one in told[2]["samples"]] == WHOLE
    assert told[2]["samples"][5][3] == "hub:tester/table train, part 2 of 2[2].image"
    assert [one[:2] for one in told[3]["samples"]] == [one[:2] for one in WHOLE[:3]]
    there = "there are: image, conditioning_image, text, url"
    errors = [one.get("error", "").removeprefix("UserError: hub:tester/") for one in told]
    assert errors[4].splitlines() == [
        f"table train: no column imgae for columns.picture; {there}; did you mean image?",
        f"hub:tester/table train: no column txt for columns.caption; {there}; did you mean text?",
        f"hub:tester/table train: no column edges for columns.condition; {there}",
    ]
    assert [line.partition("found ")[2] != "" for line in errors[5].splitlines()] == [True] * 3
    assert errors[6] == errors[4].splitlines()[1].removeprefix("hub:tester/")
    assert errors[7] == errors[8] == "table: no split trian; there are: train; did you mean train?"
    assert errors[9] == "table: no configuration defualt; there are: default; did you mean default?"
    assert errors[10].startswith("table: Revision 'v1' doesn't exist")
    assert "not found. Either its name is wrong, or the token in the environment may not" in errors[11]
    parts = [told[number]["samples"] for number in (13, 14)]
    assert [[one[:3] for one in part] for part in parts] == [WHOLE[:2], WHOLE[2:4]]
    assert len({one[4] for part in parts for one in part}) == 4, "parts of the same files"
    assert "a script, which is never run" in errors[12] and "refs/convert/parquet" in errors[12]


def test_a_private_set_needs_the_token(ask: Callable[..., list[dict[str, Any]]]) -> None:
    specs = ({"path": "hub:tester/table"}, {"path": "hub:tester/table", "streaming": True})
    guest = [spec | {"token": "hf_token_of_the_guest"} for spec in specs]
    told = ask(*specs, *guest, token=None)
    for one in told[:2]:
        assert one["error"].endswith("no token is set: set HF_TOKEN, or log in with `hf auth login`")
    for one in told[2:]:
        assert "the token in the environment may not read it" in one["error"]


@pytest.mark.slow
def test_broken_connections(ask: Callable[..., list[dict[str, Any]]], hub: Any) -> None:
    table = {"path": "hub:tester/table"}
    hub.fail("GET", "/cdn/", "half", times=1)
    hub.fail("GET", "/cdn/", 503, times=1)
    (told,) = ask(table)
    assert [one[:3] for one in told["samples"]] == WHOLE
    assert "the connection broke (Server error '503" in told["said"][0] and "(try 2 of 4)" in told["said"][0]
    hub.fail("GET", "/cdn/", 503, times=999)
    told, other = ask(table, table | {"streaming": True}, home="other")
    for one in (told["error"], other["error"]):
        assert "the connection broke 4 times, the last time with: Server error '503" in one
        assert "start again when the network works" in one
    assert len(told["said"]) == 3
    # What is there already needs no network: the Hub is asked for the newest state only.
    hub.faults.clear()
    hub.fail("GET", "/cdn/", "close", times=999)
    assert [one[:3] for one in ask(table)[0]["samples"]] == WHOLE


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for files, with the caches of `datasets` beside it."""
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = tmp_path / "files"
    made.mkdir()
    return made


def opened(said: list[str] | None = None, **given: Any) -> Samples:
    found = open_spec(SourceSpec(**given), [].append if said is None else said.append)
    assert isinstance(found, Samples)
    return found


def test_local_parquet_and_arrow(place: Path) -> None:
    for part in range(2):
        parquet.write_table(rows(3 * part, 3 * part + 3), place / f"{part}.parquet")
        with pa.ipc.new_stream(place / f"{part}.arrow", rows(0, 1).schema) as writer:
            writer.write_table(rows(3 * part, 3 * part + 3))
    for pattern in ("*.parquet", "{0,1}.parquet", "*.arrow"):
        samples = opened(path=str(place / pattern), weight=0.5, repeats=2)
        assert [[s.captions[0], s.picture.read().hex()] for s in samples] == [one[:2] for one in WHOLE]
        assert samples[0].weight == 0.5 and samples.repeats.tolist() == [2] * 6
        again = pickle.loads(pickle.dumps(samples))
        assert list(again) == list(samples) and {s.picture for s in again} == {s.picture for s in samples}
        stamps = {blob.stamp() for s in samples for blob in (s.picture, s.condition) if blob is not None}
        assert len(stamps) == 12 and None not in stamps
        assert [s.picture.stamp() for s in opened(path=str(place / pattern))] == [
            s.picture.stamp() for s in samples
        ]
    stream = look(SourceSpec(path=str(place / "*.parquet"), streaming=True), print)
    assert isinstance(stream, Stream) and stream.shards.count == 2
    assert sorted(s.captions[0] for s in stream.epoch(0, 0)) == [one[0] for one in WHOLE]
    with pytest.raises(UserError, match="no such file"):
        opened(path=str(place / "x*.parquet"))
    (place / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad\.parquet"):
        opened(path=str(place / "bad.parquet"))


def test_sets_saved_to_disk_with_other_columns(place: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from datasets import Image as Pictures

    kinds = Features(
        {"p": Pictures(), "kind": ClassLabel(names=["cat", "dog"]), "weight": Value("float32"),
         "scene": {"n": Value("int64")}}
    )  # fmt: skip
    values = {"p": [{"bytes": png(n), "path": None} for n in range(3)], "kind": [0, 1, 1],
              "weight": [1.0, None, 0.5], "scene": [{"n": 1}, None, None]}  # fmt: skip
    made = Dataset.from_dict(values, kinds)
    made.select([2, 0]).save_to_disk(place / "one")
    DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(place / "parts")
    columns = {"picture": "p", "caption": "kind"}
    found = opened(path=str(place / "one"), columns=columns)
    about = [(s.captions, s.weight, s.scene) for s in found]
    assert about == [(("dog",), 0.5, None), (("cat",), 1.0, {"n": 1})]
    assert [s.picture.read() for s in found] == [png(2), png(0)]
    assert len(opened(path=str(place / "parts"), columns=columns)) == 3
    assert len(opened(path=str(place / "parts"), columns=columns, split="test")) == 1
    for name, split, told in (
        ("parts", "tst", "no split tst; there are: train, test; did you mean test?"),
        ("one", "test", "one set without parts was saved there"),
    ):
        with pytest.raises(UserError, match=told.replace("?", r"\?")):
            opened(path=str(place / name), columns=columns, split=split)


def test_captions_of_several_kinds(place: Path) -> None:
    pictures = [{"bytes": png(n), "path": None} for n in range(4)]
    records = [{"long": "l0", "short": ["s0", "t0"]}, {"long": None, "short": ["s1"]}, None, {"long": "l3"}]
    columns = {"long": ["l0", None, None, "l3"], "short": ["s0", "s1", None, None]}
    table = {"image": pictures, "text": records, **columns}
    parquet.write_table(pa.table(table), place / "a.parquet")
    path = str(place / "a.parquet")
    wanted = [(("l0", "s0", "t0"), ("long", "short", "short")), (("s1",), ("short",)), (("l3",), ("long",))]
    seen = look(SourceSpec(path=path), print)
    assert isinstance(seen, Samples) and [(s.captions, s.kinds) for s in seen] == wanted
    assert [line.rpartition(": ")[2] for line in seen.problems()] == ["no caption in column text"]
    spec = SourceSpec(path=path, columns=Columns(caption={"long": "long", "brief": "short"}))
    seen = look(spec, print)
    assert isinstance(seen, Samples)
    of_columns = [(("l0", "s0"), ("long", "brief")), (("s1",), ("brief",)), (("l3",), ("long",))]
    assert [(s.captions, s.kinds) for s in seen] == of_columns
    assert [line.rpartition(": ")[2] for line in seen.problems()] == ["no caption in column long or short"]
    with pytest.raises(UserError, match="lnog.*did you mean long"):
        opened(path=path, columns={"caption": {"a": "lnog", "b": "short"}})
    whole = {name: [column[row] for row in (0, 1, 3)] for name, column in table.items()}
    parquet.write_table(pa.table(whole), place / "a.parquet")
    stream = look(spec.model_copy(update={"streaming": True}), print)
    assert isinstance(stream, Stream)
    assert sorted((s.captions, s.kinds) for s in stream.epoch(0, 0)) == sorted(of_columns)


def test_rows_without_picture_or_caption_are_told(place: Path) -> None:
    cells = [None, {"bytes": None, "path": None}, *({"bytes": png(n), "path": None} for n in range(3))]
    table = pa.table({"image": cells, "text": [["a"], ["b"], [], None, ["c", "d"]]})
    parquet.write_table(table, place / "a.parquet")
    spec = SourceSpec(path=str(place / "a.parquet"))
    seen = look(spec, print)
    assert isinstance(seen, Samples) and [s.captions for s in seen] == [("c", "d")] and len(seen) == 1
    assert seen[0].picture.name == f"{spec.path}[4].image" and seen[0].picture.read() == png(2)
    with pytest.raises(UserError) as caught:
        open_spec(spec, print)
    assert str(caught.value).splitlines() == [
        f"{spec.path}[0]: no picture in column image",
        f"{spec.path}[1]: no picture in column image",
        f"{spec.path}[2]: no caption in column text",
        f"{spec.path}[3]: no caption in column text",
    ]


def test_every_row_that_cannot_be_used_is_told_before_it_is_asked_for(place: Path) -> None:
    cells = [{"bytes": png(n), "path": None} for n in range(5)]
    weights, scenes = [1.0, -1.0, None, 0.5, 2.0], ['{"n": 1}', None, "{", "[]", None]
    texts = [["a"], ["b"], ["c"], ["d"], ["e", None]]
    table = {"image": cells, "text": texts, "weight": weights, "scene": scenes}
    parquet.write_table(pa.table(table), place / "a.parquet")
    seen = look(SourceSpec(path=str(place / "a.parquet"), weight=0.5), print)
    assert isinstance(seen, Samples) and len(seen) == 1 and seen.weights().tolist() == [0.5]
    assert (seen[0].captions, seen[0].scene) == (("a",), {"n": 1})
    said = [line.partition("a.parquet")[2] for line in seen.problems()]
    words = (
        "a number of at least 0",
        "is no JSON",
        "expected a record",
        "expected text, a caption or a list",
    )
    assert len(said) == 4
    for number, (line, what) in enumerate(zip(said, words, strict=True), 1):
        assert line.startswith(f"[{number}]: ") and what in line


def test_many_rows_at_once_are_those_one_after_the_other(place: Path) -> None:
    none = {"bytes": None, "path": None}
    edges = [
        None if n % 3 == 0 else none if n % 3 == 1 else {"bytes": png(n), "path": None} for n in range(40)
    ]
    cells = [None if n == 7 else {"bytes": png(100 + n), "path": None} for n in range(40)]
    table = {"image": cells, "text": [f"t{n}" for n in range(40)], "conditioning_image": edges,
             "weight": [n / 8 for n in range(40)]}  # fmt: skip
    parquet.write_table(pa.table(table), place / "a.parquet", row_group_size=9)
    seen = look(SourceSpec(path=str(place / "a.parquet"), weight=2.0), print)
    assert isinstance(seen, Samples) and len(seen) == 39
    each = [seen[row] for row in range(39)]
    assert [s.captions[0] for s in each] == [f"t{n}" for n in range(40) if n != 7]
    there = [s.condition is not None for s in each]
    assert there == [n % 3 == 2 for n in range(40) if n != 7] and list(seen) == each
    rows = np.random.default_rng(0).permutation(39).tolist()
    assert seen.many(rows) == [each[row] for row in rows] and seen.many([]) == []
    assert seen.weights().tolist() == [s.weight for s in each] == [n / 4 for n in range(40) if n != 7]
    assert each[7].picture.read() == png(108), "behind the row without a picture"


def test_pictures_that_are_files(place: Path) -> None:
    (place / "0.png").write_bytes(png(0))
    paths = [str(place / "0.png"), str(place / "1.png")]
    table = pa.table({"image": [{"bytes": None, "path": path} for path in paths], "text": ["a", "b"]})
    parquet.write_table(table, place / "a.parquet")
    zero, one = opened(path=str(place / "a.parquet"))
    assert zero.picture.read() == png(0) and str(zero.picture.stamp()).startswith(paths[0])
    assert one.picture.stamp() is None
    with pytest.raises(UserError, match=r"a\.parquet\[1\]\.image: .*1\.png: cannot be read"):
        one.picture.read()


def test_a_folder_of_its_name_is_not_taken_for_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a folder a/b lies in the current directory"):
        opened(path="hub:a/b")


def test_a_set_that_is_not_there_while_offline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    said: list[str] = []
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set, and it was not downloaded before"):
        opened(said, path="hub:tester/nothing")
    assert said == [], "it is not tried again"


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    fails = iter([True, True, False])

    def action() -> str:
        if next(fails):
            raise retry.Broken("cut")
        return "done"

    said: list[str] = []
    assert retry.retried(action, "it", said.append) == "done" and waited == [1.0, 4.0]
    assert said == [
        f"it: the connection broke (cut); trying again in {s} s (try {n} of 4)" for s, n in ((1, 2), (4, 3))
    ]
