"""Connections that break: tried again a few times, each told, and then explained."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from tuner.data.samples import Say
from tuner.errors import UserError

WAITS = (1.0, 4.0, 16.0)
"""Seconds before the second, third and fourth try."""

Result = TypeVar("Result")


class Broken(Exception):
    """A connection that broke, or a server that cannot answer now; it may work again."""


class Patience:
    """How often one thing is tried."""

    def __init__(self, what: str, say: Say) -> None:
        """
        Args:
            what: names it in messages: `hub:owner/name`.
        """
        self.what, self.say, self.failed = what, say, 0

    def reset(self) -> None:
        """It worked, so that the next failure is the first again."""
        self.failed = 0

    def after(self, error: Broken) -> None:
        """Wait after a failure.

        Raises:
            UserError: it was the last try.
        """
        if self.failed == len(WAITS):
            raise UserError(
                f"{self.what}: the connection broke {len(WAITS) + 1} times, the last time with: {error}; "
                "what was downloaded whole is kept: start again when the network works"
            ) from error
        wait = WAITS[self.failed]
        self.failed += 1
        self.say(
            f"{self.what}: the connection broke ({error}); trying again in {wait:g} s "
            f"(try {self.failed + 1} of {len(WAITS) + 1})"
        )
        time.sleep(wait)


def retried(action: Callable[[], Result], what: str, say: Say) -> Result:
    """The result of an action, tried again while it raises Broken.

    Raises:
        UserError: it was broken each time.
    """
    patience = Patience(what, say)
    while True:
        try:
            return action()
        except Broken as error:
            patience.after(error)
