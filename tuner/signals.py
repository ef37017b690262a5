"""Being asked to stop: the step is finished, a checkpoint written."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop:
    """Within it SIGTERM, SIGINT and SIGUSR1 ask the loop to stop after its step; a second SIGINT: at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

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

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.signal is not None
        asked = torch.tensor(0 if self.signal is None else 1, device=accelerator.device)
        return bool(accelerator.reduce(asked, "sum"))
