"""Being asked to stop."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner.signals import ASKED, Stop

ALONE: Any = SimpleNamespace(num_processes=1)


def test_three_signals_ask() -> None:
    assert set(ASKED) == {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_asks_and_the_handlers_come_back(number: int) -> None:
    before = {asked: signal.getsignal(asked) for asked in ASKED}
    with Stop() as stop:
        assert not stop.agreed(ALONE)
        os.kill(os.getpid(), number)
        assert stop.agreed(ALONE) and stop.signal == number
    assert {asked: signal.getsignal(asked) for asked in ASKED} == before


def test_a_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_sigterm_is_patient() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # after another signal the first interrupt only asks
        assert stop.signal == signal.SIGINT


@pytest.mark.parametrize("asked, others, agreed", [(False, 0, False), (False, 1, True), (True, 0, True)])
def test_processes_agree(asked: bool, others: int, agreed: bool) -> None:
    def reduce(mine: torch.Tensor, how: str) -> torch.Tensor:
        assert how == "sum" and int(mine) == int(asked)
        return mine + others

    two: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"), reduce=reduce)
    with Stop() as stop:
        if asked:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agreed(two) is agreed
