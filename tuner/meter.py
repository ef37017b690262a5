"""What steps report: collected, written in lots, judged."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from tuner.guard import Diverged, Watch
from tuner.log import Log


class Meter:
    """Collects what steps report and writes it in lots, so that the device is waited for seldom."""

    def __init__(self, accelerator: Accelerator, log: Log, watch: Watch) -> None:
        self.accelerator, self.log, self.watch = accelerator, log, watch
        self.rows: list[tuple[int, dict[str, Tensor], float]] = []
        self.last = math.nan
        self.waits: Callable[[], float] = lambda: 0.0  # the share of the time in which batches are waited for

    def add(self, step: int, figures: dict[str, Tensor], learning_rate: float) -> None:
        """Keep a step's figures; tensors stay on the device."""
        self.rows.append((step, figures, learning_rate))

    def flush(self, speed: float) -> None:
        """Write what was kept, and judge it, a step after the other.

        Raises:
            Diverged: the guard found something. The rows behind it are not written.
        """
        if not self.rows:
            return
        rows, self.rows = self.rows, []
        names, waits = list(rows[0][1]), self.waits()
        table = torch.stack(
            [torch.stack([figures[n].detach().float() for n in names]) for _, figures, _ in rows]
        )
        summed = self.accelerator.reduce(table, "sum").cpu()
        for (step, _, rate), values in zip(rows, summed.tolist(), strict=True):
            row = dict(zip(names, values, strict=True))
            row |= {n: v / self.accelerator.num_processes for n, v in row.items() if n != "loss"}
            others = {"learning_rate": rate, "images_per_second": speed, "data_wait": waits}
            self.log.scalars(step, {**row, **others})
            self.last = row["loss"]
            fault = self.watch.row(step, row, rate) or (self.watch.lot(step) if step == rows[-1][0] else None)
            if fault is not None:
                raise Diverged(fault, row)

    def check_weights(self, step: int) -> None:
        """Before they are written.

        Raises:
            Diverged: they are not finite.
        """
        if (fault := self.watch.weights(step)) is not None:
            raise Diverged(fault, {})
