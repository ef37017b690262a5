"""Plain lines away from a terminal, bars on one, silence on other processes."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tuner import progress


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)


def train(clock: Clock, steps: int, start: int = 0) -> progress.Progress:
    with progress.Progress("training", total=steps, start=start, clock=clock) as shown:
        for step in range(start + 1, steps + 1):
            clock.now += 2
            shown.update(step, 0.5, images=16)
    return shown


def test_plain_lines_come_by_time_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    train(Clock(), steps=12)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "training  5/12 (41 %)  loss 0.5  8.0 images/s  0:14 left  0:10 elapsed",
        "training  10/12 (83 %)  loss 0.5  8.0 images/s  0:04 left  0:20 elapsed",
        "training  12/12 (100 %)  loss 0.5  8.0 images/s  0:24 elapsed",
    ]


def test_force_color_draws_no_bar_into_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(Clock(), steps=3)
    out = capsys.readouterr().out
    assert out.splitlines() == ["training  3/3 (100 %)  loss 0.5  8.0 images/s  0:06 elapsed"]
    assert "\x1b" not in out


def test_a_continued_run_counts_only_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    shown = train(Clock(), steps=104, start=100)
    assert capsys.readouterr().out.startswith("training  104/104 (100 %)  loss 0.5  8.0 images/s")
    assert shown.images_per_second == 8.0


def test_a_line_is_printed_where_training_stops_by_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with pytest.raises(KeyboardInterrupt), progress.Progress("training", total=9, clock=clock) as shown:
        clock.now += 1
        shown.update(1, 0.5, images=4)
        raise KeyboardInterrupt
    assert capsys.readouterr().out.startswith("training  1/9 (11 %)")


def test_the_loss_is_smoothed_without_bias_and_survives_one_that_is_not_finite() -> None:
    shown = progress.Progress("training", total=9, clock=Clock())
    assert math.isnan(shown.loss)
    shown.update(1, 4.0, images=1)
    assert shown.loss == pytest.approx(4.0, rel=1e-12)
    shown.update(2, math.nan, images=1)
    assert shown.loss == pytest.approx(4.0, rel=1e-12)
    shown.update(3, 2.0, images=1)
    keep = progress.SMOOTHING
    assert shown.loss == pytest.approx((4.0 * keep + 2.0) / (keep + 1), rel=1e-12)


def test_speed_is_that_of_late() -> None:
    clock = Clock()
    shown = progress.Progress("training", total=1000, clock=clock)
    for step in range(1, 101):
        clock.now += 10 if step <= 50 else 1
        shown.update(step, 0.5, images=3)
    assert shown.images_per_second == pytest.approx(3.0, rel=1e-9)


def test_track_gives_every_item_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()

    def items() -> Iterator[int]:
        for item in range(8):
            clock.now += 2.5
            yield item

    seen = list(progress.track(items(), 8, "caching", "images", clock=clock))
    assert seen == list(range(8))
    assert capsys.readouterr().out.splitlines() == [
        "caching  4/8 (50 %)  0.4 images/s  0:10 left  0:10 elapsed",
        "caching  8/8 (100 %)  0.4 images/s  0:20 elapsed",
    ]


def test_track_of_nothing_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([], 0, "caching", "images")) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["RANK", "OMPI_COMM_WORLD_RANK"])
def test_other_processes_are_silent(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    train(Clock(), steps=8)
    progress.say("hello")
    assert list(progress.track([1, 2], 2, "caching", "images")) == [1, 2]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv(name, "0")
    progress.say("hello")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_a_terminal_gets_a_bar_with_lines_above_it() -> None:
    script = """
from tuner import progress
with progress.Progress("training", total=3) as shown:
    for step in range(1, 4):
        shown.update(step, 0.25, images=16)
        progress.say(f"[said] at {step}")
    done = list(progress.track(range(5), 5, "drawing", "pictures"))
    assert len(done) == 5
progress.say("after")
assert progress._display is None
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    root = Path(progress.__file__).parents[1]
    child = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, env=environment, cwd=root)
    os.close(theirs)
    shown = io.BytesIO()
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        shown.write(piece)
    os.close(ours)
    assert child.wait(timeout=60) == 0
    text = shown.getvalue().decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert text != plain
    assert [plain.count(f"[said] at {step}") for step in (1, 2, 3)] == [1, 1, 1]
    assert "3/3" in plain and "loss 0.25" in plain and "images/s" in plain
    assert plain.rstrip().endswith("after")
