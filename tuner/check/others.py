"""What else keeps a run from starting that has just failed with one mistake: all is told at once."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from tuner.check.asked import Asked
from tuner.check.checking import every
from tuner.check.findings import Findings, Problem
from tuner.recipe import Recipe

LONGEST = 20.0
"""Seconds that are spent on it; large sets take longer, and `tuner check` looks at them to the end."""
SHOWN = 8
"""Problems that are told; the rest is counted."""
KEY = re.compile(r"[a-z_]+(\.[a-z_0-9]+)+")
"""Of a recipe."""


class _Late(BaseException):
    """The time is over; nothing that looks for mistakes takes it for one."""


def others(recipe: Recipe, told: str) -> list[str]:
    """Lines about the other problems that a check finds; none where there are none, or several processes.

    Args:
        recipe: of the run.
        told: what the run said already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the others of them are gone, and could not be waited for
        return []
    found, whole = Findings(), False
    with contextlib.suppress(_Late, Exception), contextlib.redirect_stdout(io.StringIO()), _at_most(LONGEST):
        every(recipe, Asked(recipe=Path()), found)
        whole = True
    rest = further(found.problems, told)
    if not rest:
        return []
    count = f"{len(rest)} more problem{'s' if len(rest) > 1 else ''}{'' if whole else ' at least'}"
    lines = [f"{count}, found by looking at the rest:", *(f"  {_short(one.text)}" for one in rest[:SHOWN])]
    return lines if len(rest) <= SHOWN else [*lines, f"  ... and {len(rest) - SHOWN} more; see tuner check"]


def further(problems: list[Problem], told: str) -> list[Problem]:
    """Those that were not told yet.

    A run stops at its first mistake, and may put it in other words, as it reads whole files where a check
    reads their headers. So where none of the problems has its words, what is about the same as the first one
    is taken as told. What is wrong with the plan and the captions of data that cannot be used whole may only
    follow from that.
    """
    known = {one for one in problems if _same(one, told)}
    if not known:
        known = {one for one in problems if one.about == problems[0].about}
    follow = ("plan", "captions") if any(one.about == "data" for one in known) else ()
    return [one for one in problems if one not in known and one.about not in follow]


def _same(one: Problem, told: str) -> bool:
    """Whether it is told: its lines, or something else of the same key."""
    if one.about == "memory" and told.startswith("memory:"):  # with what would help
        return True
    key = one.text.partition(": ")[0]
    if KEY.fullmatch(key) and any(line.startswith(f"{key}: ") for line in told.splitlines()):
        return True
    own, lines = ({line.strip() for line in text.splitlines()} for text in (one.text, told))
    return own <= lines or lines <= own


def _short(text: str) -> str:
    first, *rest = text.splitlines() or [""]
    return f"{first} (and {len(rest)} lines; see tuner check)" if len(rest) > 1 else " ".join([first, *rest])


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Ends what is within it after so long, where it can be interrupted: in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
