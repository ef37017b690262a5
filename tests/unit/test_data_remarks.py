"""What is changed of pictures as they are read is told, at every run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tuner.data import index
from tuner.data.blob import File
from tuner.data.index import Memory
from tuner.data.pictures import Reading
from tuner.data.remarks import KINDS, Remarks
from tuner.data.samples import Sample


def test_each_kind_is_told_with_some_names_at_every_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (4, 4), (60 * n, 0, 0)) for n in range(4)]
    for number in range(5):  # of different lengths
        frames[0].save(tmp_path / f"{number}.gif", save_all=True, append_images=frames[1 : 2 + number % 3])
    frames[0].save(tmp_path / "a.jpg", "PNG")
    Image.new("RGBA", (4, 4), (9, 9, 9, 99)).save(tmp_path / "b.png")
    frames[0].save(tmp_path / "c.png")
    names = [*(f"{n}.gif" for n in range(5)), "a.jpg", "b.png", "c.png"]
    samples = [Sample(File(tmp_path / name), ("x",)) for name in names]
    samples[-1] = samples[-1]._replace(condition=File(tmp_path / "b.png"))

    def told(memory: str, **reading: object) -> list[str]:
        _, problems = index.look(samples, Memory(tmp_path / memory), Reading(**reading), index.Share())  # type: ignore[arg-type]
        assert not problems
        return [line.replace(f"{tmp_path}/", "") for line in capsys.readouterr().out.splitlines()]

    laid = "1 picture: transparent parts lie on the colour (1, 2, 3) (b.png)"
    usual = [
        "5 pictures: several frames or pages; the first is used (0.gif, 1.gif, 2.gif and 2 more)",
        "1 picture: its name ends in .jpg, its content is PNG (a.jpg)",
    ]
    for memory in ("one", "one", "other"):
        assert told(memory, background=(1, 2, 3)) == [*usual, laid, laid]
    masked = "1 picture: transparent parts are the mask (b.png)"
    first, second = told("one", alpha="mask"), told("new", alpha="mask")
    white = laid.replace("1, 2, 3", "255, 255, 255")
    assert first == second == [*usual, masked, white]
    assert told("new", background=(1, 2, 3)) == [*usual, laid, laid]


def test_many_kinds_are_counted() -> None:
    remarks = Remarks()
    for number in range(KINDS + 2):
        remarks.add([f"note {number}"], "a", False)
    lines = remarks.lines(Reading())
    assert len(lines) == KINDS + 1 and lines[-1].startswith("... and 2 kinds more")
