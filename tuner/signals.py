"""Being asked to stop: while training the step is finished and a checkpoint written, else it is at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from torch import Tensor

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(BaseException):
    """Asked to stop where nothing has to be finished first; what was written is whole."""


class Stop:
    """Within it SIGTERM, SIGINT and SIGUSR1 ask the loop to stop after its step; a second SIGINT: at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}
        self._at_once = False
        self._told: Tensor | None = None

    def __enter__(self) -> Stop:
        for number in ASKED:
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self._at_once:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it each of the signals ends the run where it is, as nothing would be lost.

        Raises:
            Stopped: one came, or comes.
        """
        self._at_once = True
        try:
            if self.signal is not None:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all processes get the same answer, at each step.

        On a GPU it is the answer of the step before, so that nobody waits for the device.
        """
        if accelerator.num_processes == 1:
            return self.signal is not None
        asked = torch.tensor(0 if self.signal is None else 1, device=accelerator.device)
        told = accelerator.reduce(asked, "sum")
        if accelerator.device.type != "cpu":
            told, self._told = self._told, told
        return told is not None and bool(told)


def ignore(_: int = 0) -> None:
    """Leave the signals to the process that loads for: called in its loading processes when they begin.

    Signals come to the whole group; a loading process that ended of one would end the training with it.
    """
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)
