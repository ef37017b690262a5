"""A disk that is full, read-only or not ours: one clear error, the last checkpoint whole, no litter."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tuner import checkpoint, disk
from tuner.disk import DiskError, writing
from tuner.errors import UserError

SHORT = {"train__steps": "6", "train__checkpoint__every": "2", "preview__every": "3", "preview__steps": "1"}
SHORT |= {"preview__count": "1", "preview__prompts": "[a toy]"}
PLACES = {
    "*/out/.recipe.yaml*": None,
    "*/out/metrics.jsonl*": None,
    "*/cache/latents/*": None,
    "*/.step-0000004.writing/trained.safetensors": 2,
    "*/.step-0000004.writing/state.pt": 2,
    "*/.step-0000004.writing/manifest.json": 2,
    "*/previews/.step-000006.png*": 4,
    "*/previews/.step-000006.json*": 4,
    "*/out/export/*": 6,
    "*/out/.report.html*": 6,
    "*/out/.finished.json*": 6,
}
"""Where a write fails, and the step of the last checkpoint then."""
SLOW = [place for place in PLACES if place != "*/.step-0000004.writing/state.pt"]


def broken(run: Any, code: int, step: int | None) -> str:
    """Check what a run left that could not write; what it said at last."""
    assert code == 2, run.printed
    assert "Traceback" not in run.printed
    last: str = run.printed.strip().splitlines()[-1]
    whole = run.output / "checkpoints" / f"step-{step or 0:07d}"
    kept = f"Kept: {whole} is whole ({step} steps); the same command continues from it."
    assert last.endswith(kept if step else "No checkpoint was written yet; the same command starts again.")
    litter = [p for pattern in (".*.partial", "*.writing", "*.part") for p in run.output.rglob(pattern)]
    assert litter == []
    folders = list((run.output / "checkpoints").glob("*")) if step else []
    assert all(checkpoint.at(folder) is not None for folder in folders) and bool(folders) == bool(step)
    return last


def same(kill_loop: ModuleType, run: Any, alone: Any) -> None:
    """Go on with room, and end as the run that always had some."""
    assert run.run((), 1, **SHORT) == 0, run.printed
    kill_loop.STEPS = 6
    found = kill_loop.contents(run.output)
    assert found == kill_loop.contents(alone.output) and len(found) >= 2


@pytest.fixture(scope="module")
def alone(new_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run on a disk with room."""
    run = new_run("textual_inversion", tmp_path_factory.mktemp("alone"))
    assert run.run((), 1, **SHORT) == 0, run.printed
    return run


@pytest.mark.parametrize(
    "place", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PLACES]
)
def test_every_place_that_is_written_to(
    new_run: Any, kill_loop: ModuleType, alone: Any, tmp_path: Path, place: str
) -> None:
    assert len(PLACES) == 11
    run, step = new_run("textual_inversion", tmp_path), PLACES[place]
    code = run.run([["full", place, errno.ENOSPC]], 1, **SHORT)
    last = broken(run, code, step)
    assert "cannot be written: No space left on device. " in last
    said = Path(last.split(": cannot be written")[0])
    hidden = place.rsplit("/", 1)[1].strip("*").lstrip(".")
    assert said.is_relative_to(tmp_path) and (not hidden or hidden.split("*")[0] in str(said)), said
    same(kill_loop, run, alone)


@pytest.mark.slow  # tests/unit/test_log.py has a line that fails, the tests beside what a run then leaves
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_the_log_fails_in_the_middle(
    new_run: Any, kill_loop: ModuleType, alone: Any, tmp_path: Path, number: int
) -> None:
    run = new_run("textual_inversion", tmp_path)
    last = broken(run, run.run([["full_log", 5, number]], 1, **SHORT), 4)
    assert f"{run.output / 'metrics.jsonl'}: cannot be written: {os.strerror(number)}. " in last
    same(kill_loop, run, alone)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Any]:
    """Makes a file system of its own of a given size, where this machine lets one be mounted."""
    place = tmp_path / "small"
    place.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system may be mounted here")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def fill(place: Path, leave: int) -> Path:
    """Fill a file system up to so many bytes."""
    filler = place / "filler"
    with filler.open("wb") as file:
        while (room := disk.free(place) - leave) > 0:
            file.write(b"0" * min(room, 1 << 16))
            file.flush()
    return filler


def test_a_file_system_that_fills_up(
    new_run: Any, kill_loop: ModuleType, alone: Any, small: Any, tmp_path: Path
) -> None:
    place = small("64m")
    run = new_run("textual_inversion", tmp_path)
    settings = {**SHORT, "output": str(place / "out")}
    # Room for what is written before the first step, and for no checkpoint: it fills while the run waits.
    started = run.start([["slow_step", 3, 5.0, str(tmp_path / "in-step")]], 1, **settings)
    while not (tmp_path / "in-step").exists():
        assert run.server.ask("poll", started) is None, run.printed
    filler = fill(place, 8192)
    run.ground, inside = run.ground, new_run("textual_inversion", place)
    (place / "printed.txt").symlink_to(tmp_path / "printed.txt")
    last = broken(inside, run.wait(started), 2)
    assert ": cannot be written: No space left on device. Kept: " in last
    filler.unlink()
    assert run.run((), 1, **settings) == 0, run.printed
    kill_loop.STEPS = 6
    found, wanted = kill_loop.contents(place / "out"), kill_loop.contents(alone.output)
    trained = "checkpoints/step-0000006/trained.safetensors"
    assert found.keys() == wanted.keys() and found[trained] == wanted[trained]


def test_too_little_room_is_told_before_the_first_step(new_run: Any, small: Any, tmp_path: Path) -> None:
    place = small("256k")
    run = new_run("full", tmp_path)
    assert run.run((), 1, **{**SHORT, "output": str(place / "out")}) == 2
    last = run.printed.strip().splitlines()[-1]
    assert last.startswith(f"output: {place / 'out'}: 0.2 MiB are free, and about ")
    assert last.endswith("Make room, or choose another output.") and "train.checkpoint.keep: 2" in last
    assert list(place.iterdir()) == []


def test_an_output_that_cannot_be_written_to(new_run: Any, small: Any, tmp_path: Path) -> None:
    place = small("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    run = new_run("textual_inversion", tmp_path)
    assert run.run((), 1, **{**SHORT, "output": str(place / "deep" / "out")}) == 2
    said = f"output: {place / 'deep' / 'out'} (in {place}) cannot be written to: Read-only file system"
    assert run.printed.strip().startswith(said) and run.printed.count("\n") == 1


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; expected a folder, or nothing yet"):
        disk.check_writable(tmp_path / "file" / "out", "output")
    disk.check_writable(tmp_path / "new" / "out", "output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    with pytest.raises(RuntimeError, match="^mine$"), writing(tmp_path / "a"):
        raise RuntimeError("mine")
    with pytest.raises(DiskError, match="a: cannot be written: Not a directory"), writing(tmp_path / "a"):
        (tmp_path / "c").write_text("")
        (tmp_path / "c" / "d").write_text("")
