"""Tars as sources, local and at addresses: samples by name, random access, what is refused or damaged."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tuner.data.blob import File
from tuner.data.samples import Samples
from tuner.data.sources import retry
from tuner.data.sources.opening import look, open_spec
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import LeftOut, Stream
from tuner.data.sources.urls import expand
from tuner.errors import UserError

FULL = {
    "0.jpg": b"zero",
    "0.txt": "erste ü\n".encode(),
    "0.cls": b"7",
    "d/1.v2.png": b"condition",
    "d/1.PNG": b"one",
    "d/1.json": json.dumps({"text": ["a", "b"], "weight": 0.5, "scene": {"x": 1}}).encode(),
    "d/1.mask.webp": b"mask",
    "._d.png": b"clutter",
}


def tar(
    place: Path, members: Mapping[str, bytes], mode: str = "w", *, kind: int = tarfile.PAX_FORMAT
) -> Path:
    with tarfile.open(place, mode, format=kind) as made:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            made.addfile(info, io.BytesIO(data))
    return place


def numbered(first: int, last: int) -> dict[str, bytes]:
    pairs = [(f"{n:03d}.png", str(n).encode()) for n in range(first, last)]
    return {name: data for png, data in pairs for name, data in ((png, data), (png[:3] + ".txt", data))}


def test_captions_of_several_kinds(tmp_path: Path) -> None:
    record = json.dumps({"text": {"long": "l", "short": ["s", "t"]}}).encode()
    place = tar(tmp_path / "a.tar", {"0.png": b"zero", "0.json": record})
    wanted = (("l", "s", "t"), ("long", "short", "short"))
    assert [(s.captions, s.kinds) for s in opened(place)] == [wanted]


def opened(path: object, said: list[str] | None = None, index: Path | None = None, **more: Any) -> Samples:
    found = open_spec(SourceSpec(path=str(path), **more), [].append if said is None else said.append, index)
    assert isinstance(found, Samples)
    return found


def error(path: object, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(path, **more)
    return str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_the_same_name_are_a_sample(tmp_path: Path, kind: int) -> None:
    place = tar(
        tmp_path / "a.tar", {"deep/" + "n" * 40 + "/" + name: data for name, data in FULL.items()}, kind=kind
    )
    said: list[str] = []
    whole = tar(tmp_path / "b.tar", {**FULL, "0.v2.png": b"c0", "0.mask.png": b"m0"}, kind=kind)
    samples = opened(whole, said, condition_from="v2", mask_from="mask", weight=2.0)
    zero, one = samples
    assert [zero.picture.read(), one.picture.read()] == [b"zero", b"one"]
    assert (zero.captions, one.captions) == (("erste ü",), ("a", "b"))
    assert one.condition is not None and one.condition.read() == b"condition"
    assert one.mask is not None and one.mask.read() == b"mask" and one.mask.name == f"{whole}: d/1.mask.webp"
    assert (zero.weight, one.weight, zero.scene, one.scene) == (2.0, 1.0, None, {"x": 1})
    assert said == [f"{whole}: looking for its samples", f"{whole}: members that are not used: *.cls"]
    assert [s.picture.name for s in opened(place, said)] == [
        f"{place}: deep/{'n' * 40}/{name}" for name in ("0.jpg", "d/1.PNG")
    ]
    stamps = {blob.stamp() for blob in (zero.picture, one.picture, one.condition, one.mask)}
    assert len(stamps) == 4 and None not in stamps
    assert list(pickle.loads(pickle.dumps(samples))) == [zero, one]


def test_many_archives_and_members_that_are_not_side_by_side(tmp_path: Path) -> None:
    for number in range(3):
        members = numbered(10 * number, 10 * number + 10)
        tar(tmp_path / f"s{number}.tar", dict(sorted(members.items(), key=lambda item: item[0][::-1])))
    for pattern in ("s*.tar", "s{0..2}.tar"):
        samples = opened(tmp_path / pattern)
        assert len(samples) == 30
        assert sorted(int(s.picture.read()) for s in samples) == list(range(30))
        assert all(s.captions == (s.picture.read().decode(),) for s in samples)
    assert "no such archive" in error(tmp_path / "x*.tar") and "no such archive" in error(tmp_path / "s9.tar")


def test_an_index_is_kept_until_the_archive_changes(tmp_path: Path) -> None:
    place, index = tar(tmp_path / "a.tar", FULL), tmp_path / "index"
    said: list[str] = []
    first = list(opened(place, said, index))
    assert list(opened(place, said, index)) == first
    assert [line for line in said if "looking" in line] == [f"{place}: looking for its samples"]
    assert said[1] == said[2] == f"{place}: members that are not used: *.cls, *.mask.webp, *.v2.png"
    tar(place, {"2.png": b"two", "2.txt": b"new"})
    assert [s.captions for s in opened(place, said, index)] == [("new",)] and len(list(index.iterdir())) == 2
    for file in index.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert [s.captions for s in opened(place, said, index)] == [("new",)]
    with pytest.raises(UserError, match="the archive was changed"):
        first[0].picture.read()


def test_what_is_left_out_is_kept_with_the_rest(tmp_path: Path) -> None:
    place = tar(tmp_path / "a.tar", {"0.png": b"zero", "0.txt": b"x", "1.txt": b"no picture"})
    said: list[str] = []
    for _ in range(2):
        found = look(SourceSpec(path=str(place)), said.append, 0, tmp_path / "index")
        assert isinstance(found, Samples) and len(found) == 1 and len(list(found.problems())) == 1
    assert [line for line in said if "looking" in line] == [f"{place}: looking for its samples"]


def test_what_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    members = {
        "0.png": b"", "0.jpg": b"", "0.txt": b"", "1.txt": b"x", "2.png": b"x", "3.png": b"",
        "3.txt": b"caf\xe9", "4.png": b"", "4.json": b"{", "5.png": b"", "5.json": b'{"text": 1}',
        "6.png": b"", "6.txt": b"",
        "6.caption": b"", "7.png": b"", "7.json": b'{"text": "x", "weight": "y"}', "8.png": b"", "8.txt": b"",
    }  # fmt: skip
    lines = error(tar(tmp_path / "a.tar", members), condition_from="edges").splitlines()
    told = [line.removeprefix(f"{tmp_path / 'a.tar'}: ") for line in lines]
    assert len(told) == 9 and all("expected one condition ending in edges.png" in line for line in told)
    wanted = [
        "0: expected one picture, found 0.png, 0.jpg",
        "1: no picture, only 1.txt",
        "2: no caption; expected a .txt, a .caption, or a .json with text in it",
        "3: 3.txt: not UTF-8 text",
        "4: 4.json: not JSON",
        "5: expected text, a caption or a list of captions (or these by kind), found 1",
        "6: several captions: 6.txt and 6.caption; keep one",
        "7: expected a weight",
        "8: expected one condition",
    ]
    assert len(told) == len(wanted)
    for line, expected in zip(told, wanted, strict=True):
        assert line.startswith(expected[:3]) and expected[3:] in line, line


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png"])
def test_members_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    place = tar(tmp_path / "a.tar", {"0.png": b"", "0.txt": b"", name: b"evil"})
    assert error(place) == f"{place}: {name}: refused: its name leads out of the archive"
    with pytest.raises(UserError, match="leads out of the archive"):
        next(served(tmp_path, place.read_bytes()).epoch(0, 0))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    place = tmp_path / "a.tar"
    with tarfile.open(place, "w") as made:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = kind, "/etc/passwd"
        made.addfile(info)
    assert f"{place}: 0.png: refused: a " in error(place)


def served(folder: Path, content: bytes) -> Stream:
    """A tar at an address, from a file of its own."""
    (folder / "served.tar").write_bytes(content)
    found = open_spec(SourceSpec(path="http://127.0.0.1:9/x.tar"), print)
    assert isinstance(found, Stream)
    found.shards.addresses[:] = [(folder / "served.tar").as_uri()]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("cut", [100, 512 * 3 + 7, 512 * 5, -10240 + 300])
def test_damaged_archives(tmp_path: Path, cut: int) -> None:
    place = tar(tmp_path / "a.tar", numbered(0, 10))
    whole = place.read_bytes()
    assert len(opened(place)) == 10
    place.write_bytes(whole[:cut])
    assert "damaged" in error(place)
    place.write_bytes(whole[:2048] + b"\x01" * 512 + whole[2560:])
    assert "damaged after 2048 bytes" in error(place)


def test_compressed_and_empty_archives(tmp_path: Path) -> None:
    place = tar(tmp_path / "a.tar.gz", FULL, "w:gz")
    assert "it is compressed: unpack it" in error(place)
    assert "no samples found in e.tar" in error(tar(tmp_path / "e.tar", {}))


def test_braces() -> None:
    assert expand("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"] and expand("plain") == ["plain"]
    for wrong in ("a{1}", "a{}", "a{1..", "a}", "{2..1}"):
        with pytest.raises(UserError, match="expected braces"):
            expand(wrong)


@pytest.fixture
def shards(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stream]:
    """Five tars of twenty samples on the Hub's stand-in, in a private set, as a stream."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(5):
        tar(folder / f"{number}.tar", numbered(20 * number, 20 * number + 20))
    hub.serve(folder, "tester/tars", kind="dataset", private=True)
    hub.take_in(monkeypatch, tmp_path)
    monkeypatch.setattr(retry, "WAITS", (0.01, 0.01, 0.01))

    def make(pattern: str = "{0..4}.tar", said: list[str] | None = None, **more: Any) -> Stream:
        spec = SourceSpec(path=f"{hub.url}/datasets/tester/tars/resolve/main/{pattern}", **more)
        found = open_spec(spec, [].append if said is None else said.append)
        assert isinstance(found, Stream)
        return found

    return make


def numbers(samples: Any) -> list[int]:
    return [int(sample.picture.read()) for sample in samples]


def test_a_stream_is_shuffled_by_seed_and_epoch(shards: Callable[..., Stream]) -> None:
    stream = shards(buffer=30, weight=0.5)
    first = numbers(stream.epoch(1, 0))
    assert sorted(first) == list(range(100)) and numbers(stream.epoch(1, 0)) == first
    others = [numbers(stream.epoch(*at)) for at in ((1, 1), (2, 0))]
    assert all(sorted(one) == sorted(first) and one != first for one in others)
    in_shards = [len({n // 20 for n in first[at : at + 20]}) for at in range(0, 100, 20)]
    assert max(in_shards) > 1, "samples of several shards come together"
    assert numbers(shards(buffer=1).epoch(1, 0))[:20] != first[:20]
    sample = next(stream.epoch(1, 0))
    assert sample.weight == 0.5 and sample.captions == (sample.picture.read().decode(),)
    assert sample.picture.name.endswith(".png") and sample.picture.name.startswith("http://127.0.0.1")


@pytest.mark.parametrize("processes", [2, 7])
def test_processes_share_a_stream(shards: Callable[..., Stream], processes: int) -> None:
    stream = shards(buffer=8)
    parts = [numbers(stream.epoch(0, 3, rank, processes)) for rank in range(processes)]
    assert sorted(sum(parts, [])) == list(range(100)) and all(parts)
    endless = [stream.forever(0, 0, rank, processes) for rank in range(processes)]
    passed = [next(one) for one in endless for _ in range(55)]
    assert {one.epoch for one in passed} >= {0, 1}
    places = Counter((one.epoch, one.position) for one in passed)
    assert len(passed) == 55 * processes and set(places.values()) == {1}


def test_a_broken_connection_goes_on_where_it_broke(shards: Callable[..., Stream], hub: Any) -> None:
    said: list[str] = []
    stream = shards(said=said, buffer=1)
    whole = numbers(stream.epoch(0, 0))
    hub.fail("GET", "/cdn/", "half", times=2)
    hub.fail("GET", "/resolve/", 503)
    assert numbers(stream.epoch(0, 0)) == whole and len(said) == 3
    assert "bytes are missing); trying again in" in said[0] + said[1] and "503" in "".join(said)
    assert "(try 2 of 4)" in said[0]
    hub.fail("GET", "/cdn/", "close", times=99)
    with pytest.raises(UserError, match=r"\d.tar: the connection broke 4 times, the last time with: "):
        list(stream.epoch(0, 0))


def test_the_hub_wants_a_token_and_storage_none(
    shards: Callable[..., Stream], hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(numbers(shards("1.tar").epoch(0, 0))) == 20 and hub.asked("GET", "/cdn/") == 1
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"answered 401 .*is HF_TOKEN set"):
        next(shards("1.tar").epoch(0, 0))


def test_bad_samples_and_damage_in_a_stream(tmp_path: Path) -> None:
    bad = tar(tmp_path / "a.tar", {**numbered(0, 3), "x.png": b"", "y.txt": b"", **numbered(3, 5)})
    stream = served(tmp_path, bad.read_bytes())
    with pytest.raises(UserError, match=r"served.tar: x: no caption"):
        list(stream.epoch(0, 0))
    said: list[str] = []
    stream.left_out = LeftOut(4, said.append)
    for epoch in range(2):  # what comes again is not told again
        assert sorted(numbers(stream.epoch(0, epoch))) == list(range(5))
    assert len(said) == 2 and all(line.startswith("left out: file:") for line in said)
    with pytest.raises(UserError, match="damaged"):
        list(served(tmp_path, bad.read_bytes()[: 512 * 5]).epoch(0, 0))
    packed = tar(tmp_path / "b.tgz", numbered(0, 4), "w:gz").read_bytes()
    assert sorted(numbers(served(tmp_path, packed).epoch(0, 0))) == list(range(4))


def test_a_thousand_samples_are_had_at_random_without_unpacking(tmp_path: Path) -> None:
    place = tar(tmp_path / "a.tar", numbered(0, 1000))
    samples = opened(place, index=tmp_path)
    start = time.perf_counter()
    again = opened(place, index=tmp_path)
    assert time.perf_counter() - start < 1 and len(again) == 1000
    assert [samples[i].picture.read() for i in (999, 0, 500)] == [b"999", b"0", b"500"]
    assert sorted(os.listdir(tmp_path)) == sorted(["a.tar", *(p.name for p in tmp_path.glob("*.arrow"))])
    assert File(place).read()[:3] == b"000"
