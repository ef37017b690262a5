"""Being asked to stop."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner.signals import ASKED, Stop, Stopped, ignore

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


def test_on_a_gpu_the_answer_is_that_of_the_step_before() -> None:
    sums = iter([0, 1, 2])
    gpu: Any = SimpleNamespace(type="cuda")

    class Accelerator:
        num_processes, device = 2, gpu

        def reduce(self, mine: torch.Tensor, how: str) -> torch.Tensor:
            return torch.tensor(next(sums))

    tensor = torch.tensor
    with pytest.MonkeyPatch.context() as patch, Stop() as stop:
        patch.setattr(torch, "tensor", lambda value, device=None: tensor(value))
        accelerator: Any = Accelerator()
        assert [stop.agreed(accelerator) for _ in range(3)] == [False, False, True]


def test_where_nothing_has_to_be_finished_it_ends_at_once() -> None:
    with Stop() as stop:
        with pytest.raises(Stopped), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        reached = False
        with pytest.raises(Stopped), stop.at_once():  # it came before
            reached = True
        assert not reached
        os.kill(os.getpid(), signal.SIGTERM)  # outside it only asks


def test_loading_processes_leave_signals_to_their_parent() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        ignore(0)
        for number in ASKED:
            os.kill(os.getpid(), number)
        os.write(writing, b"alive")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and os.read(reading, 5) == b"alive"
    os.close(reading)
    os.close(writing)
