"""k steps, `kill -9` and the same command again: the bytes of N steps at once. At length: kill_loop.py."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

METHODS = ("controlnet", "textual_inversion", "lora", "full")  # the LoRA with dropout
FAST = {"train__accumulate": "2", "train__ema": "0.9", "data__workers": "2", "train__steps": "8"}
SLOW = [
    dict(zip(("train__accumulate", "train__ema", "data__cache", "data__workers"), values, strict=True))
    for values in (("1", "null", "off", "0"), ("2", "0.9", "on", "0"), ("2", "null", "off", "2"))
]
CASES = [("lora", 1, FAST)]
CASES += [(*case, {"train__steps": "16"}) for case in itertools.product(METHODS, (1, 2), SLOW)]  # type: ignore[misc]
"""Method, processes, settings; the first one also by default."""


def settled(case: tuple[Any, ...]) -> dict[str, str]:
    return {key: value for part in case[2:] for key, value in part.items()}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if i else []) for i, case in enumerate(CASES)]
)
def test_killed_and_continued_it_is_the_run_left_alone(
    new_run: Any, kill_loop: ModuleType, tmp_path: Path, case: tuple[Any, ...]
) -> None:
    assert len(CASES) == 1 + 4 * 2 * 3
    method, processes, settings = case[0], case[1], settled(case)
    steps = int(settings["train__steps"])
    alone, killed = new_run(method, tmp_path / "alone"), new_run(method, tmp_path / "killed")
    assert alone.run((), processes, **settings) == 0, alone.printed
    if settings["train__accumulate"] == "2":
        assert killed.run([["in_accumulation", 5, 0.003]], processes, **settings) == -signal.SIGKILL
        if steps > 8:  # once more; one start less where slow tests are not asked for
            assert killed.run([["in_accumulation", 6, 0.0]], processes, **settings) == -signal.SIGKILL
    else:
        after_steps(killed, 5, lambda: killed.start((), processes, **settings), signal.SIGKILL)
    assert [p.name for p in (killed.output / "checkpoints").glob("step-*")] == ["step-0000004"]
    assert not (killed.output / "export").exists()
    assert killed.run((), processes, **settings) == 0, killed.printed
    assert f"step-0000004 (4 of {steps} steps are done)" in killed.printed
    assert "the result will be, bit for bit, that of a run that was not stopped" in killed.printed
    kill_loop.STEPS = steps
    found, wanted = kill_loop.contents(killed.output), kill_loop.contents(alone.output)
    assert found == wanted and len(found) >= 2


def after_steps(run: Any, steps: int, start: Callable[[], int], number: int) -> int:
    """Start, send the group a signal when so many steps are in the log; the exit code."""
    started, metrics = start(), run.output / "metrics.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until and run.server.ask("poll", started) is None:
        if metrics.is_file() and metrics.read_text().count('"loss"') >= steps:
            break
        time.sleep(0.005)
    run.server.ask("send", started, number)
    code: int = run.wait(started)
    return code


LONG = {"train__steps": "2000", "train__checkpoint__every": "1000", "data__workers": "2"}


@pytest.mark.parametrize(
    "number, processes, code",
    [
        (signal.SIGTERM, 2, 0),
        pytest.param(signal.SIGUSR1, 2, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 2, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 1, 0, marks=pytest.mark.slow),
    ],
)
def test_the_whole_group_is_asked_to_stop(
    new_run: Any, tmp_path: Path, number: int, processes: int, code: int
) -> None:
    # As Slurm and a terminal do it: loading processes get the signal, too.
    run = new_run("textual_inversion", tmp_path)
    found = after_steps(run, 3, lambda: run.start((), processes, **LONG), number)
    assert found == code, run.printed
    assert "Traceback" not in run.printed and "Error" not in run.printed
    kept = [p.name for p in (run.output / "checkpoints").iterdir()]
    assert len(kept) == 1 and "step-0000003" <= kept[0] < "step-0001000"
    assert f"stopped. Kept: {run.output / 'checkpoints' / kept[0]} is whole" in run.printed
    assert run.printed.count("stopped. Kept") == 1  # one process speaks
    steps = int(kept[0][5:])
    more = LONG | {"train__steps": str(steps + 1)}
    assert run.run((), processes, **more) == 0
    assert f"({steps} of {steps + 1} steps are done)" in run.printed


def test_a_second_interrupt_stops_at_once(new_run: Any, kill_loop: ModuleType, tmp_path: Path) -> None:
    # The first one comes in a step that takes half a minute: it would be finished.
    run = new_run("textual_inversion", tmp_path)
    settings = {"train__steps": "50", "train__checkpoint__every": "2"}
    started = run.start([["slow_step", 4, 30.0, str(run.place / "in-step")]], 1, **settings)
    until = time.monotonic() + 100
    while not (run.place / "in-step").exists() and time.monotonic() < until:
        assert run.server.ask("poll", started) is None, run.printed
        time.sleep(0.01)
    began = time.monotonic()
    run.server.ask("send", started, signal.SIGINT)
    time.sleep(0.3)
    assert run.server.ask("poll", started) is None
    run.server.ask("send", started, signal.SIGINT)
    assert run.wait(started) == 130 and time.monotonic() - began < 20
    kept = run.output / "checkpoints" / "step-0000004"
    assert f"stopped at once. Kept: {kept} is whole (4 steps); the same command continues" in run.printed
    assert "Traceback" not in run.printed


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_asked_to_stop_while_it_exports(
    new_run: Any, kill_loop: ModuleType, tmp_path: Path, processes: int
) -> None:
    run = new_run("full", tmp_path)
    started = run.start((), processes, train__steps="4")
    ready, until = kill_loop._export(tmp_path), time.monotonic() + 200
    while ready() is None and time.monotonic() < until:
        assert run.server.ask("poll", started) is None, run.printed
        time.sleep(0.001)
    run.server.ask("send", started, signal.SIGTERM)
    assert run.wait(started) == 0
    assert "stopped. Kept: " in run.printed and "Traceback" not in run.printed
    assert not (run.output / "finished.json").exists()
    assert not list((run.output / "export").rglob(".*.partial"))
    assert run.run((), processes, train__steps="4") == 0
    assert (run.output / "finished.json").exists()
