"""Which samples an optimiser step sees, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from tuner import counted
from tuner.errors import UserError


class Slot(NamedTuple):
    """A place in an optimiser step's batch."""

    sample: int  # index into the samples
    epoch: int
    position: int  # in the epoch
    weight: float  # 0 for a place that is only filled


class Beside(NamedTuple):
    """Samples that come in every batch beside the others, such as class pictures.

    Attributes:
        first: the index of the first of them; they lie behind the others.
        number: how many there are.
        weight: of each in the loss.
    """

    first: int
    number: int
    weight: float


class Plan:
    """Every sample once an epoch (times its repeats), in an order drawn from (seed, epoch).

    The last batch of an epoch is smaller where the batch size does not divide the epoch; its empty places are
    filled with samples of weight 0, so that shapes stay static and no process is without work.

    Where there are samples beside, every second place of a batch (from its second on) is one's: all of them
    come once, in an order drawn anew, before one comes again, whatever the others' epochs are.
    """

    def __init__(
        self, repeats: Sequence[int], batch_size: int, seed: int, beside: Beside | None = None
    ) -> None:
        """
        Args:
            repeats: for each sample, how often it comes in an epoch.
            batch_size: pictures in one optimiser step.
            seed: the recipe's.
            beside: samples that come besides.

        Raises:
            UserError: the batch is larger than an epoch, or has no place for samples beside.
        """
        self.entries = [index for index, times in enumerate(repeats) for _ in range(times)]
        self.own = batch_size if beside is None else batch_size - batch_size // 2
        if self.own > len(self.entries):
            of_others = "" if beside is None else f", {self.own} of them no class pictures"
            raise UserError(
                f"train.batch_size: {batch_size} pictures in a batch{of_others}, but an epoch has only "
                f"{len(self.entries)}; take at most that, or raise data.source.repeats"
            )
        if beside is not None and batch_size < 2:
            raise UserError(
                "train.batch_size: found 1; with class pictures expected at least 2, half of each"
            )
        self.batch_size = batch_size
        self.beside = beside
        self.seed = seed
        self.steps_per_epoch = -(-len(self.entries) // self.own)
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def step(self, step: int) -> list[Slot]:
        """The batch of optimiser step `step`, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        start = batch * self.own
        places = range(start, min(start + self.own, len(order)))
        slots = [Slot(self.entries[order[p]], epoch, p, 1.0) for p in places]
        real = len(slots)
        slots += [Slot(self.entries[order[p]], epoch, p, 0.0) for p in range(self.own - real)]
        others = self._others(step, epoch, batch, real)
        return [slot for pair in zip_longest(slots, others) for slot in pair if slot is not None]

    def _others(self, step: int, epoch: int, batch: int, real: int) -> list[Slot]:
        """The step's samples beside; as many of them count as there are others that do."""
        if self.beside is None:
            return []
        first, number, weight = self.beside
        size, slots = self.batch_size - self.own, []
        for place in range(size):
            turn, at = divmod(step * size + place, number)
            order = counted.permutation(number, self.seed, turn, purpose="order beside")
            position = len(self.entries) + batch * size + place  # no other sample of the epoch has it
            slots.append(Slot(first + int(order[at]), epoch, position, weight if place < real else 0.0))
        return slots

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
