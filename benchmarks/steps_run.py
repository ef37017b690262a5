"""One case of benchmarks/steps.py, in this process: the product's own run, interrupted between its steps.

The run is the product's from the recipe on: recipe.load, device.start, build.build, loop.train. Only
`loop.one_step` is led through here, so that between two steps something can be looked at:

    warm-up; two steps for the peak memory; then so many times a stretch of the product's steps and one of
    the bare loop's (A-B-A-B); then a stretch with timers, and a step under the counter of FLOPs.

A stretch begins with a few steps that are not timed, in which the loader's processes, that load ahead, find
their rhythm again. On a GPU the device is waited for at both ends of a stretch and nowhere else.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import flops
import torch
from steps_bare import Bare
from steps_case import Case, recipe_of
from steps_timers import Timers, matrix_rate

from tuner import build, device, loop
from tuner.log import Log
from tuner.signals import Stop

H200 = 790e12
"""The FLOP/s that bf16 matrix products reach on one H200."""
APART = 2
"""Steps at the beginning of each stretch that are not timed, besides those that were loaded ahead."""


@dataclass(frozen=True)
class Length:
    """Timed steps of a stretch, how many stretches there are of each kind, and steps before all of them."""

    steps: int = 20
    repeats: int = 5
    warm: int = 3


class _EnoughError(Exception):
    """All is measured."""


def measure(case: Case, length: Length) -> dict[str, Any]:
    """The case's row.

    Raises:
        UserError: the product refuses the case.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = built(case, Path(folder))
        found: dict[str, Any] = {}
        with Log(run.output, False, None, True, None) as log, Stop() as stop:
            try:
                with led(lambda run, made: _script(run, made, length, found)):
                    loop.train(run, log, None, stop)
            except _EnoughError:
                pass
    return {**asdict(case), "device": run.accelerator.device.type, **told(case, found)}


def built(case: Case, folder: Path) -> loop.Run:
    """The product's run of a case."""
    recipe = recipe_of(case, folder)
    about = recipe.train
    accelerator = device.start(about.precision, about.threads, about.deterministic)
    return build.build(recipe, accelerator)


Script = Iterator[Timers | None]
"""What is done before each step; it may give timers that watch the step."""


@contextmanager
def led(begin: Callable[[loop.Run, loop.Made], Script]) -> Iterator[None]:
    """Within it the training loop's steps go through a script, which ends the training when it ends."""
    passing, scripts = loop.one_step, []

    def step(run: loop.Run, made: loop.Made, batches: Iterator[Any], number: int) -> Any:
        if not scripts:
            scripts.append(begin(run, made))
        timers = next(scripts[0], _END)
        if timers is _END:
            raise _EnoughError
        return passing(run, made, batches if timers is None else timers.waited(batches), number)

    with mock.patch.object(loop, "one_step", step):
        yield


_END: Any = object()


def _script(run: loop.Run, made: loop.Made, length: Length, found: dict[str, Any]) -> Script:
    """Measure; the keys of `found` are written as they come."""
    here = run.accelerator.device
    apart = APART + 2 * run.workers
    for _ in range(length.warm + apart):
        yield None
    reset_peak(here)
    yield None
    yield None
    found["peak_bytes"] = peak(here)
    bare, ours, plain = Bare(run, made), [], []
    for _ in range(length.repeats):
        for _ in range(apart):
            yield None
        start = now(here)
        for _ in range(length.steps):
            yield None
        ours.append((now(here) - start) / length.steps)
        for _ in range(apart):
            bare.step()
        start = now(here)
        for _ in range(length.steps):
            bare.step()
        plain.append((now(here) - start) / length.steps)
    del bare
    found["ours"], found["bare"] = ours, plain
    for _ in range(apart):
        yield None
    with Timers(run, made) as timers:
        for _ in range(length.steps):
            yield timers
    found["shares"] = timers.shares()
    with counted(run) as (counter, needed):
        yield None
    found["flops"], found["work"] = counter.get_total_flops(), needed.work
    found["matrix_rate"] = matrix_rate(here, str(run.accelerator.mixed_precision).replace("no", "fp32"))


@contextmanager
def counted(run: loop.Run) -> Iterator[tuple[Any, flops.Needed]]:
    """Within it FLOPs are counted, and what the losses need of them; what is compiled runs eagerly."""
    networks = dict(run.family.modules())
    branch = getattr(run.methods[0], "branch", None)
    if branch is not None:
        networks["branch"] = branch
    backward = run.accelerator.backward
    eager, needed = torch.compiler.set_stance("force_eager"), flops.Needed(networks)

    def settled(loss: torch.Tensor, **more: Any) -> None:
        needed.settle(loss)
        backward(loss, **more)

    with eager, flops.counter() as counter, needed, mock.patch.object(run.accelerator, "backward", settled):
        yield counter, needed


def told(case: Case, found: dict[str, Any]) -> dict[str, Any]:
    """A row's figures."""
    ours, bare, work = found["ours"], found["bare"], found["work"]
    seconds, rate = statistics.median(ours), found["matrix_rate"]
    ratios = [one / other for one, other in zip(ours, bare, strict=True)]
    done = found["flops"] / seconds
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return {
        "threads": torch.get_num_threads(),
        "steps_per_second": 1 / seconds,
        "images_per_second": case.batch / seconds,
        "seconds_per_step": spread(ours),
        "bare_seconds_per_step": spread(bare),
        "overhead": spread(ratios),
        "peak_mib": found["peak_bytes"] / 2**20,
        "shares": found["shares"],
        "tflop": {
            "counted": found["flops"] / 1e12,
            "least": work.least / 1e12,
            "unused": work.unused / 1e12,
            "idle": work.idle / 1e12,
            "networks": {key: [n / 1e12 for n in both] for key, both in work.networks.items()},
        },
        "exact": found["flops"] == work.expected,
        "tflops_per_second": done / 1e12,
        "matrix_tflops_per_second": rate / 1e12,
        "percent_of_matrix_rate": 100 * done / rate,
        "percent_of_790": 100 * done / H200 if "H200" in name else None,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Of several measurements of the same: the middle and the ends."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def now(here: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if here.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(here: torch.device) -> None:
    """From now on a new peak of memory counts."""
    if here.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(here: torch.device) -> int:
    """Bytes since then at most: of this process's resident set, or of what torch has given out on the GPU."""
    if here.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
