"""How a run talks to the user: progress bars in a terminal, plain lines anywhere else.

All of it goes to standard output, and only on the main process.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

Item = TypeVar("Item")
Clock = Callable[[], float]

PLAIN_EVERY = 10.0  # seconds between two plain lines
WINDOW = 30.0  # seconds over which speed is measured
SMOOTHING = 0.98  # weight of the past in the shown loss: about 50 steps

_display: RichProgress | None = None  # the one live display; bars inside bars are rows of it


def _alone() -> None:
    """In a forked process: the display is the other's, and its lock may be held for ever."""
    global _display
    _display = None


os.register_at_fork(after_in_child=_alone)


def say(text: str) -> None:
    """Print a line, above the bar where there is one."""
    if not _is_main():
        return
    if _display is not None:
        _display.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
    else:
        print(text, flush=True)


class Progress:
    """The progress of training: a context, updated after every optimiser step.

    with Progress("training", total=1500, start=200) as progress:
        progress.update(step, loss, images=16)
    """

    def __init__(
        self,
        description: str,
        total: int,
        start: int = 0,
        every: float = PLAIN_EVERY,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            total: steps there are.
            start: steps done before, by the run that this one continues.
            every: seconds between two plain lines, where the output is no terminal.
            clock: gives seconds; for tests.
        """
        self._bar = _Bar(description, total, start, "images", every, clock)
        self._smoothed = 0.0
        self._weight = 0.0

    def __enter__(self) -> Progress:
        self._bar.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, step: int, loss: float, images: int) -> None:
        """Show that `step` steps are done; `images` is how many pictures came since the last update."""
        if math.isfinite(loss):
            self._smoothed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)
        shown = self.loss if math.isfinite(loss) else loss
        self._bar.advance(step, images, f"loss {shown:.4g}")

    @property
    def loss(self) -> float:
        """The smoothed loss: an exponential mean of the finite ones, without bias towards 0."""
        return self._smoothed / self._weight if self._weight else math.nan

    @property
    def images_per_second(self) -> float:
        """Recent speed, over about half a minute; 0 before the first update."""
        return self._bar.speed()[0]


def track(
    iterable: Iterable[Item],
    total: int,
    description: str,
    unit: str,
    every: float = PLAIN_EVERY,
    clock: Clock = time.monotonic,
) -> Iterator[Item]:
    """Go through `iterable` (`total` items, counted in `unit`, for instance "images") showing progress."""
    bar = _Bar(description, total, 0, unit, every, clock)
    bar.open()
    try:
        for done, item in enumerate(iterable, start=1):
            yield item
            bar.advance(done, 1, "")
    finally:
        bar.close()


def duration(seconds: float) -> str:
    """Seconds as 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Bar:
    """One row of the live display, or plain lines every so often."""

    def __init__(
        self, description: str, total: int, start: int, unit: str, every: float, clock: Clock
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.every, self.clock = every, clock
        self.done = start
        self.began = self.printed = clock()
        self.note = ""
        self.pending = False  # whether something happened since the last plain line
        self.recent: deque[tuple[float, int, int]] = deque([(self.began, start, 0)])  # time, steps, units
        self.units = 0
        self.row: TaskID | None = None
        self.owner = False  # whether it opened the display, and so closes it

    def open(self) -> None:
        self.began = self.printed = self.clock()
        self.recent[0] = (self.began, self.done, 0)
        if _is_main() and _is_terminal():
            global _display
            if _display is None:
                _display, self.owner = _live(), True
            self.row = _display.add_task(
                self.description, total=self.total, completed=self.done, details="", speed=""
            )

    def advance(self, done: int, units: int, note: str) -> None:
        now = self.clock()
        self.done, self.note, self.pending = done, note, True
        self.units += units
        self.recent.append((now, done, self.units))
        while len(self.recent) > 10 and now - self.recent[1][0] >= WINDOW:
            self.recent.popleft()
        if self.row is not None and _display is not None:
            _display.update(self.row, completed=done, details=note, speed=self.figures())
        elif now - self.printed >= self.every:
            self.print_line(now)

    def close(self) -> None:
        global _display
        if self.row is None or _display is None:
            if self.pending:
                self.print_line(self.clock())
        elif self.owner:
            _display.stop()
            _display = None
        else:
            _display.remove_task(self.row)

    def speed(self) -> tuple[float, float]:
        """Units a second and steps a second, of late."""
        (first, steps, units), (last, *_) = self.recent[0], self.recent[-1]
        passed = last - first
        if passed <= 0:
            return 0.0, 0.0
        return (self.units - units) / passed, (self.done - steps) / passed

    def figures(self) -> str:
        """Speed and the time that is left, as far as they are known."""
        units, steps = self.speed()
        if steps <= 0:
            return ""
        left = duration((self.total - self.done) / steps)
        speed = f"{units:.1f} {self.unit}/s"
        return speed if self.done >= self.total else f"{speed}  {left} left"

    def print_line(self, now: float) -> None:
        self.printed, self.pending = now, False
        share = f" ({100 * self.done // self.total} %)" if self.total else ""
        counted = f"{self.done}/{self.total}{share}"
        elapsed = f"{duration(now - self.began)} elapsed"
        say(
            "  ".join(
                part for part in (self.description, counted, self.note, self.figures(), elapsed) if part
            )
        )


def _live() -> RichProgress:
    display = RichProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[details]}", markup=False),
        TextColumn("{task.fields[speed]}", markup=False),
        TimeElapsedColumn(),
        console=Console(force_terminal=True),
        refresh_per_second=4,
        expand=True,
    )
    display.start()
    return display


def _is_terminal() -> bool:
    # not left to rich: with FORCE_COLOR, which many CI services set, it would draw bars into log files
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def _is_main() -> bool:
    # what torchrun, accelerate launch and the MPI launchers set; known before any accelerator exists
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
