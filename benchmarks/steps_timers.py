"""Where a step's time goes, by timers around its parts, and a machine's rate of matrix products.

A part's time is without that of parts within it. On the CPU it is read from the clock. On a GPU events are
put into the stream at both ends, so it is the device's time between them: work of the part, and waiting for
the host where the host is slower. What lies in no part is `host`: random numbers, noise, the loss, the guard,
the log, the learning rate, and all waiting between parts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest import mock

import torch

from tuner import loop

PARTS = ("data", "text", "autoencoder", "unet", "branch", "backward", "optimiser")


class Timers:
    """Within it a run's steps are timed part by part; `shares` tells, behind it."""

    def __init__(self, run: loop.Run, made: loop.Made) -> None:
        self.run, self.made = run, made
        self.events = run.accelerator.device.type == "cuda"
        self._marks: list[tuple[str | None, Any]] = []  # from here on time belongs to this part
        self._open: list[str] = []
        self._held = ExitStack()

    def __enter__(self) -> Self:
        run, made, family = self.run, self.made, self.run.family
        for owner, name, part in (
            (family, "encode_prompts", "text"),
            (family, "encode_images", "autoencoder"),
            (family, "predict", "unet"),  # around the call: a hook within would change what is compiled
            (family, "control", "branch"),
            (run.accelerator, "backward", "backward"),
            (run.accelerator, "clip_grad_norm_", "optimiser"),
            (made.prepared, "step", "optimiser"),
            (made.prepared, "zero_grad", "optimiser"),
            *(((made.parts.ema, "update", "optimiser"),) if made.parts.ema is not None else ()),
        ):
            timed = self._timed(getattr(owner, name), part)
            self._held.enter_context(mock.patch.object(owner, name, timed))
        self._mark(None)
        return self

    def __exit__(self, *error: Any) -> None:
        self._mark(None)
        self._held.close()

    def waited(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; waiting for them is the part `data`."""
        while True:
            with self.part("data"):
                one = next(batches)
            yield one

    def shares(self) -> dict[str, float]:
        """Of the whole time, by part; they add up to 1."""
        if self.events:
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[part or "host"] += start.elapsed_time(end) if self.events else end - start
        whole = sum(spent.values())
        return {part: spent[part] / whole for part in (*PARTS, "host")}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time within it belongs to this part."""
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1] if self._open else None)

    def _mark(self, part: str | None) -> None:
        if self.events:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return timed


def matrix_rate(device: torch.device, precision: str, rounds: int = 8) -> float:
    """FLOP/s of products of square matrices in a precision, the best of some rounds."""
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = 0.0
    for _ in range(rounds):  # the first are slower: caches, clocks
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
