"""Which samples an optimiser step sees, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tuner import counted
from tuner.errors import UserError


class Slot(NamedTuple):
    """A place in an optimiser step's batch."""

    sample: int  # index into the samples
    epoch: int
    position: int  # in the epoch
    weight: float  # 0 for a place that is only filled


class Plan:
    """Every sample once an epoch (times its repeats), in an order drawn from (seed, epoch).

    The last batch of an epoch is smaller where the batch size does not divide the epoch; its empty places are
    filled with samples of weight 0, so that shapes stay static and no process is without work.
    """

    def __init__(self, repeats: Sequence[int], batch_size: int, seed: int) -> None:
        """
        Args:
            repeats: for each sample, how often it comes in an epoch.
            batch_size: pictures in one optimiser step.
            seed: the recipe's.

        Raises:
            UserError: the batch is larger than an epoch.
        """
        self.entries = [index for index, times in enumerate(repeats) for _ in range(times)]
        if batch_size > len(self.entries):
            raise UserError(
                f"train.batch_size: {batch_size} pictures in a batch, but an epoch has only "
                f"{len(self.entries)}; take at most that, or raise data.source.repeats"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = -(-len(self.entries) // batch_size)
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def step(self, step: int) -> list[Slot]:
        """The batch of optimiser step `step`, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        start = batch * self.batch_size
        places = range(start, min(start + self.batch_size, len(order)))
        slots = [Slot(self.entries[order[p]], epoch, p, 1.0) for p in places]
        fill = self.batch_size - len(slots)
        return slots + [Slot(self.entries[order[p]], epoch, p, 0.0) for p in range(fill)]

    def _epoch(self, epoch: int) -> Sequence[int]:
        if self._order[0] != epoch:
            self._order = (epoch, counted.permutation(len(self.entries), self.seed, epoch).tolist())
        return self._order[1]


def share(slots: Sequence[Slot], micro: int, rank: int, accumulate: int, processes: int) -> Sequence[Slot]:
    """The part of a step's batch that one process sees in one of its micro-batches.

    The parts of all processes and micro-batches together are the batch, in order, so the batch does not
    depend on how it is divided.
    """
    size = len(slots) // (accumulate * processes)
    start = (micro * processes + rank) * size
    return slots[start : start + size]
