"""What is known of pictures is read once; what cannot be used is told at once, or left out where allowed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tuner.data import index
from tuner.data.blob import File, Held, Listed
from tuner.data.index import Known, Memory, Share
from tuner.data.pictures import Reading
from tuner.data.samples import Behind, Chosen, Joined, Sample, Samples, sources, take, weights
from tuner.errors import UserError

COUNT = 6
READ: Counter[str] = Counter()


@dataclass(frozen=True)
class Counted(File):
    """A file whose readings are counted."""

    def read(self) -> bytes:
        READ[self.path.name] += 1
        return super().read()


@pytest.fixture(autouse=True)
def nothing_read() -> None:
    READ.clear()


def picture(place: Path, high: int, wide: int, seed: int = 0) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (high, wide, 3), np.uint8)
    Image.fromarray(noise).save(place)
    return place


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Every second one with a condition of twice the size, every third with a mask."""
    folder = tmp_path / "data"
    folder.mkdir()
    made = []
    for number in range(COUNT):
        high, wide = 10 + number, 20
        place = picture(folder / f"{number}.png", high, wide, number)
        condition = picture(folder / f"c{number}.png", 2 * high, 2 * wide, number) if not number % 2 else None
        mask = picture(folder / f"m{number}.png", high, wide, number) if not number % 3 else None
        made.append(
            Sample(
                Counted(place),
                (f"{number}",),
                None if condition is None else Counted(condition),
                None if mask is None else Counted(mask),
            )
        )
    return made


FILES = COUNT + 3 + 2
NAMES = {*(f"{n}.png" for n in range(COUNT)), *(f"c{n}.png" for n in (0, 2, 4)), "m0.png", "m3.png"}


def look(
    samples: list[Sample], tmp_path: Path, share: Share | None = None, limit: int = 2**28
) -> index.Index:
    memory = Memory(tmp_path / "memory")
    found, problems = index.look(samples, memory, Reading(limit=limit), share or Share())
    assert not problems
    return found


def known(blob: Counted) -> Known:
    with Image.open(blob.path) as shown:
        return Known(hashlib.sha256(blob.path.read_bytes()).hexdigest(), shown.height, shown.width)


def test_the_second_look_reads_no_file(samples: list[Sample], tmp_path: Path) -> None:
    found = look(samples, tmp_path)
    assert dict.fromkeys(NAMES, 1) == READ and len(NAMES) == FILES
    for column, name in (("pictures", "picture"), ("conditions", "condition"), ("masks", "mask")):
        blobs = [getattr(sample, name) for sample in samples]
        assert list(getattr(found, column)) == [None if blob is None else known(blob) for blob in blobs]
    assert found.sizes.tolist() == [[10 + n, 20] for n in range(COUNT)] and found.sizes.dtype == np.int64
    READ.clear()
    assert look(samples, tmp_path) == found
    assert look(samples[::-1], tmp_path).only(range(COUNT)[::-1]) == found
    assert not READ


def test_a_changed_file_is_read_again_and_alone(samples: list[Sample], tmp_path: Path) -> None:
    before = look(samples, tmp_path)
    READ.clear()
    place = tmp_path / "data" / "1.png"
    picture(place, 11, 20, seed=99)
    after = look(samples, tmp_path)
    assert READ == {"1.png": 1}
    changed = [a != b for a, b in zip(before.pictures, after.pictures, strict=True)]
    assert changed == [n == 1 for n in range(COUNT)]
    about = place.stat()
    os.utime(place, ns=(about.st_atime_ns, about.st_mtime_ns + 10**9))  # of another time, of the same bytes
    READ.clear()
    assert look(samples, tmp_path) == after and READ == {"1.png": 1}


def test_the_same_file_in_several_samples_is_read_once(samples: list[Sample], tmp_path: Path) -> None:
    found = look([samples[0], samples[0]._replace(captions=("again",))], tmp_path)
    assert READ == {"0.png": 1, "c0.png": 1, "m0.png": 1} and found.pictures[0] == found.pictures[1]


def test_bytes_without_a_stamp_are_read_each_time(tmp_path: Path) -> None:
    class Unknown(Counted):
        def stamp(self) -> str | None:
            return None

    sample = Sample(Unknown(picture(tmp_path / "a.png", 5, 6)), ("a",))
    for count in (1, 2):
        assert look([sample], tmp_path).sizes.tolist() == [[5, 6]] and READ["a.png"] == count


def broken(samples: list[Sample], tmp_path: Path) -> dict[int, str]:
    """Something wrong with all samples but number 3; with what is expected to be told."""
    folder = tmp_path / "data"
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is whole
    (folder / "2.png").write_bytes(b"")
    picture(folder / "c4.png", 40, 20)
    picture(folder / "m0.png", 20, 10)
    (folder / "5.png").unlink()
    return {
        0: r"m0\.png: 10x20 pixels do not fit the picture's 20x10",
        1: r"1\.png: this picture cannot be read: .*",
        2: r"2\.png: this picture cannot be read: the file is empty \(0 bytes\)",
        4: r"c4\.png: 20x40 pixels do not fit the picture's 20x14",
        5: r"5\.png: cannot be read: No such file or directory",
    }


def test_every_problem_is_told_at_once_with_their_number(samples: list[Sample], tmp_path: Path) -> None:
    expected = broken(samples, tmp_path)
    memory = Memory(tmp_path / "memory")
    for _ in range(2):  # what was found broken is looked at again: it may have been mended
        _, problems = index.look(samples, memory, Reading(), Share())
        assert problems.keys() == expected.keys()
        with pytest.raises(UserError) as caught:
            index.sift(problems, COUNT, 0)
        lines = str(caught.value).splitlines()
        assert len(lines) == 6
        for line, wanted in zip(lines, expected.values(), strict=False):
            assert re.search(wanted + "$", line), (line, wanted)
        assert lines[-1] == (f"5 of {COUNT} samples cannot be used; data.unreadable: N leaves out as many")


def test_as_many_as_allowed_are_left_out_and_told(
    samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = broken(samples, tmp_path)
    found, problems = index.look(samples, Memory(tmp_path / "memory"), Reading(), Share())
    with pytest.raises(
        UserError, match=r"5 of 6 samples cannot be used; data\.unreadable: 4 may be left out"
    ):
        index.sift(problems, COUNT, 4)
    capsys.readouterr()
    assert index.sift(problems, COUNT, 5) == [3]
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "5 of 6 samples cannot be used and are left out:" and len(told) == 1 + len(expected)
    assert found.only([3]).sizes.tolist() == [[13, 20]]
    assert index.sift({}, 3, 0) == [0, 1, 2] and not capsys.readouterr().out


def test_what_the_sources_left_out_counts_too() -> None:
    before = ["a.txt: not UTF-8 text", "b.png: no caption"]
    with pytest.raises(index.UnreadableError, match=r"3 of 12 samples .*; data\.unreadable: 2 may") as caught:
        index.sift({4: "4.png: wrong"}, 10, 2, before)
    assert caught.value.problems == (*before, "4.png: wrong")
    assert index.sift({4: "4.png: wrong"}, 6, 3, before) == [0, 1, 2, 3, 5]


def test_a_column_is_a_sequence_of_what_is_known() -> None:
    digests = np.arange(4 * 32, dtype=np.uint8).reshape(4, 32)
    column = index.Column(digests, np.array([[3, 4], [-1, -1], [0, 0], [5, 6]], np.int32))
    expected = [Known(digests[0].tobytes().hex(), 3, 4), None, Known(digests[2].tobytes().hex(), 0, 0)]
    assert list(column)[:3] == column[:3] == expected and column[-1] == column[3]
    assert column.there.tolist() == [True, False, True, True]
    assert column.take(np.array([3, 1])) == [column[3], None] and column.before(column) == [*column, *column]
    assert list(column.hexes) == [row.tobytes().hex() for row in digests] and len(column.hexes) == 4


def test_very_many_samples_are_not_python_objects() -> None:
    """What is known of a sample takes 120 bytes, and reading it again makes nothing that stays."""
    count = 20_000
    data = picture_bytes()
    samples = [Sample(Held("a", data), ("x",))] * count

    class Same(Memory):
        def __init__(self) -> None:
            pass

        def of(self, stamps: Sequence[str]) -> dict[str, Known]:
            return {stamp: Known("ab" * 32, 3, 4) for stamp in stamps}

    tracemalloc.start()
    found, problems = index.look(samples, Same(), Reading(), Share())
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not problems and found.sizes.shape == (count, 2) and found.pictures[-1] == Known("ab" * 32, 3, 4)
    assert kept < 130 * count and peak < 200 * count


def picture_bytes() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3)).save(data, "PNG")
    return data.getvalue()


def test_many_problems_are_counted() -> None:
    with pytest.raises(UserError) as caught:
        index.sift({number: f"{number}.png: wrong" for number in range(30)}, 40, 29)
    lines = str(caught.value).splitlines()
    assert lines[:2] == ["0.png: wrong", "1.png: wrong"] and lines[-2] == "... and 10 more"
    assert lines[-1] == "30 of 40 samples cannot be used; data.unreadable: 29 may be left out"


def test_a_lower_limit_refuses_what_is_known(samples: list[Sample], tmp_path: Path) -> None:
    look(samples, tmp_path)
    _, problems = index.look(samples, Memory(tmp_path / "memory"), Reading(limit=300), Share())
    assert sorted(problems) == [0, 2, 4]  # their conditions have 4 times the pixels
    assert all("pixels are more than the 300 allowed" in problem for problem in problems.values())


@pytest.mark.parametrize("fails", [False, True])
def test_two_processes_share_the_reading(samples: list[Sample], tmp_path: Path, fails: bool) -> None:
    """The other one reads its part while this one waits; each file is read once, but for what is broken."""
    expected = broken(samples, tmp_path) if fails else {}
    mine: list[Counter[str]] = []
    waits = []

    def other() -> None:
        waits.append(1)
        mine.append(READ.copy())
        READ.clear()
        index.look(samples, Memory(tmp_path / "memory"), Reading(), Share(1, 2))

    found, problems = index.look(samples, Memory(tmp_path / "memory"), Reading(), Share(0, 2, other))
    assert problems.keys() == expected.keys() and len(waits) == 1
    if not fails:
        assert len(mine[0]) == 7 and set(mine[0]) | set(READ) == NAMES
        assert sum(mine[0].values()) + sum(READ.values()) == FILES
        assert found == look(samples, tmp_path / "alone")
    READ.clear()
    index.look(samples, Memory(tmp_path / "memory"), Reading(), Share(0, 2, lambda: waits.append(1)))
    assert len(waits) == 2, "each waits as often, whatever it knows already"
    assert fails or not READ


def test_bytes_in_memory_are_known_by_their_content(tmp_path: Path) -> None:
    data = picture(tmp_path / "a.png", 3, 4).read_bytes()
    samples = [Sample(Held(name, data), ("x",)) for name in ("one", "other")]
    assert look(samples, tmp_path).pictures == [Known(hashlib.sha256(data).hexdigest(), 3, 4)] * 2


class Numbers(Samples):
    """Samples whose captions are their numbers."""

    def one(self, number: int) -> Sample:
        scene = {"captions": [{"form": "long"}]} if number % 2 else None
        return Sample(Held(f"{self.source} {number}", b""), (f"{number}",), scene=scene, weight=number + 1.0)


def test_many_samples_at_once_are_those_one_after_the_other() -> None:
    joined = Joined([Numbers("a", 5, 1, 1.0, 0), Numbers("b", 0, 1, 1.0, 1), Numbers("c", 600, 1, 0.5, 2)])
    chosen = Chosen(joined, [604, 0, 4, 5, 300])
    both = Behind(chosen, [Sample(Held("x", b""), ("x",), source=3, weight=2.0)])
    assert len(both) == 6 and both[0].weight == 300.0 and both[0].source == 2 and both[0].kinds == ("long",)
    for samples in (joined, chosen, both, both[2:5]):
        each = [samples[row] for row in range(len(samples))]
        assert list(samples) == each and len(each) > 2
        rows = [len(each) - 1, 0, 1, 1]
        assert take(samples, rows) == [each[row] for row in rows]
        assert sources(samples).tolist() == [one.source for one in each]
        assert weights(samples).tolist() == [one.weight for one in each]


def test_a_listed_file_is_the_file_of_its_path(tmp_path: Path) -> None:
    place = picture(tmp_path / "a.png", 3, 4)
    listed, file = Listed(str(place)), File(place)
    assert listed == file and file == listed and hash(listed) == hash(file) and listed != File(tmp_path)
    assert (listed.name, listed.path, listed.stamp()) == (file.name, place, file.stamp())
    assert pickle.loads(pickle.dumps(listed)).read() == file.read()
