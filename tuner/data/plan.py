"""Which samples an optimiser step sees, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from math import gcd, lcm
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tuner import counted
from tuner.data.buckets import Assigned, Bucket
from tuner.errors import UserError

Ints = npt.NDArray[np.int64]
HUNDRED = 100
"""Repeats are whole hundredths: so that after 100 epochs at most, every sample has come as often as asked."""


class Slot(NamedTuple):
    """A place in an optimiser step's batch."""

    sample: int  # index into the samples
    epoch: int
    position: int  # in the epoch
    weight: float  # in the loss; 0 for a place that is only filled
    bucket: Bucket | None = None  # the same in the whole batch; None: of the size that all have


class Beside(NamedTuple):
    """Samples that come in every batch beside the others, such as class pictures.

    They take the batch's bucket, whatever their own shape.

    Attributes:
        first: the index of the first of them; they lie behind the others.
        number: how many there are.
        weight: of each in the loss.
    """

    first: int
    number: int
    weight: float


class _Epoch(NamedTuple):
    """One epoch: its entries bucket after bucket, cut into batches, and the batches in their order."""

    row: Ints  # [entries]
    position: Ints  # [entries] in the epoch, consecutive in a batch
    bucket: Ints  # [batches]
    start: Ints  # [batches] first entry
    size: Ints  # [batches]
    others: Ints  # [batches] places beside in the batches before


class Plan:
    """Every sample once an epoch (times its repeats) in each of its buckets, in an order drawn anew for each.

    A batch is of one bucket. The last batch of a bucket is smaller where the batch size does not divide its
    entries. Either it stays so, and has only so many places of weight 0 that processes and micro-batches
    share it evenly ("smaller"); or all batches are filled up with places of weight 0, so that shapes are
    static ("padded"). A filled place shows an entry of the bucket again and does not count: what counts in a
    step does not depend on how it is divided.

    Repeats may be fractional: of a source with 0.5 half of the samples come in each epoch, and after two all
    have come once; which come when is drawn anew every two. Then epochs differ in length, and steps_in() says
    how many steps they are; else all are of the same length.

    Where there are samples beside, every second place of a batch (from its second on) is one's: all of them
    come once, in an order drawn anew, before one comes again, whatever the others' epochs are.
    """

    def __init__(
        self,
        repeats: Sequence[float] | npt.NDArray[np.float64],
        batch_size: int,
        seed: int,
        beside: Beside | None = None,
        assigned: Assigned | None = None,
        weights: npt.ArrayLike | None = None,
        last: Literal["smaller", "padded"] = "padded",
        parts: int = 1,
    ) -> None:
        """
        Args:
            repeats: for each sample, how often it comes in an epoch; whole hundredths.
            batch_size: pictures in one optimiser step.
            seed: the recipe's.
            beside: samples that come besides.
            assigned: the samples' buckets; not given: all are of one size.
            weights: above 0, for each sample its weight in the loss; not given: 1.
            last: what becomes of a bucket's last batch.
            parts: micro-batches of a step over all processes; each gets as many places.

        Raises:
            UserError: the batch is larger than an epoch, or has no place for samples beside; repeats are no
                hundredths.
        """
        hundredths = _hundredths(repeats)
        count = len(hundredths)
        self._sample = np.arange(count) if assigned is None else assigned.sample
        self._bucket: Ints = np.zeros(count, np.int64) if assigned is None else assigned.bucket
        self.shapes = (None,) if assigned is None else assigned.shapes
        self._weight = np.ones(count) if weights is None else np.asarray(weights, np.float64)
        assert len(self._weight) == count and (self._weight > 0).all()
        parted: tuple[Ints, Ints] = np.divmod(hundredths[self._sample], HUNDRED)
        self._whole, part = parted
        self.cycle = lcm(*(HUNDRED // gcd(HUNDRED, p) for p in np.unique(part).tolist()))
        """Epochs after which all samples have come as often as asked."""
        self._part: Ints = part * self.cycle // HUNDRED
        self.own = batch_size if beside is None else batch_size - batch_size // 2
        """Places of a batch that are not for samples beside."""
        self.batch_size, self.beside, self.seed = batch_size, beside, seed
        self._padded, self._parts = last == "padded", parts
        self._sizes: Ints = self._count()
        self._most = int(self._sizes.sum(axis=1).max())
        _check(batch_size, self.own, self._most, beside)
        steps = (-(-self._sizes // self.own)).sum(axis=1)
        self._starts = np.concatenate([[0], np.cumsum(steps)])  # first step of each epoch of a cycle
        self._others_of = self._count_others()
        self._drawn: tuple[tuple[int, int], _Epoch] | None = None
        self._turn: tuple[int, Ints] = (-1, np.zeros(0, np.int64))

    @property
    def entries(self) -> Ints:
        """The samples of the first epoch, each as often as it comes in it."""
        return np.repeat(self._sample, self._times(0, 0))

    @property
    def sizes(self) -> Ints:
        """How many entries of each bucket come in the first epoch, int64 [buckets]."""
        first: Ints = self._sizes[0]
        return first

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; where repeats are fractional their mean, rounded up."""
        return -(-int(self._starts[-1]) // self.cycle)

    def words(self, steps: int) -> str:
        """What a run of so many steps sees."""
        besides = "" if self.beside is None else f" and {self.beside.number} class pictures beside"
        return (
            f"{len(self.entries)} samples an epoch{besides}, {steps} steps of {self.batch_size} pictures "
            f"({steps / self.steps_per_epoch:.3g} epochs)"
        )

    def pictures(self, step: int) -> int:
        """How many pictures a step sees, at most."""
        return self.batch_size

    def steps_in(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs, exactly."""
        cycles, rest = divmod(epochs, self.cycle)
        return cycles * int(self._starts[-1]) + int(self._starts[rest])

    def epoch_of(self, step: int) -> tuple[int, int]:
        """The epoch that a step is in, and which of its batches it is."""
        cycles, rest = divmod(step, int(self._starts[-1]))
        epoch = int(np.searchsorted(self._starts, rest, side="right")) - 1
        return cycles * self.cycle + epoch, rest - int(self._starts[epoch])

    def step(self, step: int, before: int = 0) -> list[Slot]:
        """The batch of optimiser step `step`, counted from 0.

        Args:
            step: of this plan.
            before: epochs that other plans had before; this one's are counted and drawn from there on.
        """
        epoch, batch = self.epoch_of(step)
        drawn = self._epoch(epoch, before)
        bucket, start, real = (int(column[batch]) for column in (drawn.bucket, drawn.start, drawn.size))
        others = self._others(epoch, before, int(drawn.others[batch]), real, self.shapes[bucket])
        wanted = self.own if self._padded else real + -(real + len(others)) % self._parts
        sizes = self._sizes[epoch % self.cycle]
        first, number = int(sizes[:bucket].sum()), int(sizes[bucket])  # filled with the bucket's first again
        places = [*range(start, start + real), *(first + i % number for i in range(wanted - real))]
        rows, positions = drawn.row[places], drawn.position[places].tolist()
        samples = self._sample[rows]
        weights = self._weight[samples]
        weights[real:] = 0
        slots = [
            Slot(sample, before + epoch, position, weight, self.shapes[bucket])
            for sample, position, weight in zip(samples.tolist(), positions, weights.tolist(), strict=True)
        ]
        return [slot for pair in zip_longest(slots, others) for slot in pair if slot is not None]

    def _others(self, epoch: int, before: int, start: int, real: int, bucket: Bucket | None) -> list[Slot]:
        """The step's samples beside; as many of them count as there are others that do."""
        if self.beside is None:
            return []
        first, number, weight = self.beside
        cycles, rest = divmod(epoch, self.cycle)
        until = cycles * int(self._others_of.sum()) + int(self._others_of[:rest].sum()) + start
        slots = []
        for place in range(self._beside_of(real)):
            turn, at = divmod(until + place, number)
            if self._turn[0] != turn:
                self._turn = (turn, counted.permutation(number, self.seed, turn, purpose="order beside"))
            position = self._most + start + place  # no other sample of the epoch has it
            counts = weight if place < real else 0.0
            slots.append(Slot(first + int(self._turn[1][at]), before + epoch, position, counts, bucket))
        return slots

    def _beside_of(self, real: int) -> int:
        size = self.batch_size - self.own
        return size if self._padded else min(size, real)

    def _epoch(self, epoch: int, before: int) -> _Epoch:
        if self._drawn is None or self._drawn[0] != (epoch, before):
            self._drawn = (epoch, before), self._draw(epoch, before)
        return self._drawn[1]

    def _draw(self, epoch: int, before: int) -> _Epoch:
        rows = np.repeat(np.arange(len(self._sample)), self._times(epoch, before))
        rows = rows[counted.permutation(len(rows), self.seed, before + epoch)]
        rows = rows[np.argsort(self._bucket[rows], kind="stable")]
        sizes = self._sizes[epoch % self.cycle]
        batches = -(-sizes // self.own)
        bucket = np.repeat(np.arange(len(sizes)), batches)
        nth = np.arange(len(bucket)) - np.repeat(_before(batches), batches)
        start = np.repeat(_before(sizes), batches) + nth * self.own
        size = np.minimum(self.own, np.repeat(np.cumsum(sizes), batches) - start)
        order = np.arange(len(bucket))  # of one bucket the batches are in random order already
        if len(sizes) > 1:
            order = counted.permutation(len(bucket), self.seed, before + epoch, purpose="order of batches")
        first = np.empty_like(start)
        first[order] = _before(size[order])
        position = np.repeat(first - start, size) + np.arange(len(rows))
        size = size[order]
        others = np.array([self._beside_of(real) for real in size.tolist()], np.int64)
        return _Epoch(rows, position, bucket[order], start[order], size, _before(others))

    def _times(self, epoch: int, before: int) -> Ints:
        """How often each row comes in an epoch."""
        if self.cycle == 1:
            return self._whole
        begins = epoch - epoch % self.cycle
        order = counted.permutation(len(self._part), self.seed, before + begins, purpose="turns")
        order = order[np.argsort(self._group()[order], kind="stable")]
        _, sizes = np.unique(self._group(), return_counts=True)
        turn = np.empty_like(order)  # the row's place among those of its bucket and repeats
        turn[order] = np.arange(len(order)) - np.repeat(_before(sizes), sizes)
        extra = (epoch + turn) * self._part % self.cycle < self._part
        return self._whole + extra.astype(np.int64)

    def _group(self) -> Ints:
        """Rows that take turns have the same number."""
        return self._bucket * HUNDRED + self._part

    def _count(self) -> Ints:
        """How many entries of each bucket come in each epoch of a cycle, int64 [cycle, buckets]."""
        whole = np.zeros(len(self.shapes), np.int64)
        np.add.at(whole, self._bucket, self._whole)
        sizes = np.tile(whole, (self.cycle, 1))
        every = np.arange(self.cycle)
        for group, rows in zip(*np.unique(self._group(), return_counts=True), strict=True):
            bucket, part = divmod(int(group), HUNDRED)
            comes = (every[:, None] + every) * part % self.cycle < part  # [epoch, turn], as in _times()
            sizes[:, bucket] += rows // self.cycle * part + comes[:, : rows % self.cycle].sum(axis=1)
        return sizes

    def _count_others(self) -> Ints:
        """How many places beside there are in each epoch of a cycle, int64 [cycle]."""
        full, rest = np.divmod(self._sizes, self.own)
        of_rest = np.array([self._beside_of(real) if real else 0 for real in range(self.own)], np.int64)
        counts: Ints = (full * self._beside_of(self.own) + of_rest[rest]).sum(axis=1)
        return counts


class Stages:
    """Plans one after another, such as for 256 pixels and then 512.

    Epochs are counted through: a stage begins with a new one, so that nothing is drawn twice.
    """

    def __init__(self, plans: Sequence[Plan], steps: Sequence[int]) -> None:
        """
        Args:
            plans: of the stages.
            steps: optimiser steps of each, 1 or more.
        """
        assert len(plans) == len(steps) > 0 and min(steps) > 0
        self.plans, self._ends = tuple(plans), np.cumsum(steps)
        last = [plan.epoch_of(number - 1)[0] + 1 for plan, number in zip(plans, steps, strict=True)]
        self._before = np.cumsum([0, *last])

    @property
    def steps(self) -> int:
        """Optimiser steps of all."""
        return int(self._ends[-1])

    @property
    def batch_size(self) -> int:
        """Pictures in one optimiser step of the last stage."""
        return self.plans[-1].batch_size

    def words(self, steps: int) -> str:
        """What a run of so many steps sees, stage by stage."""
        assert steps == self.steps
        lengths = np.diff(self._ends, prepend=0).tolist()
        parts = [plan.words(length) for plan, length in zip(self.plans, lengths, strict=True)]
        return "; then ".join(parts)

    def pictures(self, step: int) -> int:
        """How many pictures a step sees, at most."""
        return self.plans[self.find(step)[0]].batch_size

    def find(self, step: int) -> tuple[int, int]:
        """The stage of a step, and the step in it, both counted from 0."""
        assert 0 <= step < self.steps
        stage = int(np.searchsorted(self._ends, step, side="right"))
        return stage, step - (int(self._ends[stage - 1]) if stage else 0)

    def step(self, step: int) -> list[Slot]:
        """The batch of optimiser step `step`, counted from 0 over all stages."""
        stage, within = self.find(step)
        return self.plans[stage].step(within, int(self._before[stage]))


def share(slots: Sequence[Slot], micro: int, rank: int, accumulate: int, processes: int) -> Sequence[Slot]:
    """The part of a step's batch that one process sees in one of its micro-batches.

    The parts of all processes and micro-batches together are the batch, in order, so the batch does not
    depend on how it is divided.
    """
    size, rest = divmod(len(slots), accumulate * processes)
    assert rest == 0, "the plan makes batches that can be divided"
    start = (micro * processes + rank) * size
    return slots[start : start + size]


def balanced(weights: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Repeats by which several sources come in an epoch in given shares.

    The source whose samples are needed least often comes once; no sample is left out of an epoch.

    Args:
        weights: above 0, the sources' shares, of any sum.
        counts: how many samples each has, 1 or more.

    Returns:
        For each source its repeats, 1 or more, to the hundredth: shares are right to half a percent.
    """
    wanted = [weight / count for weight, count in zip(weights, counts, strict=True)]
    assert min(wanted) > 0
    return [round(each / min(wanted) * HUNDRED) / HUNDRED for each in wanted]


def _hundredths(repeats: Sequence[float] | npt.NDArray[np.float64]) -> Ints:
    exact = np.asarray(repeats, np.float64) * HUNDRED
    rounded = np.rint(exact)
    wrong = np.flatnonzero((np.abs(exact - rounded) > 1e-6) | (exact < 0))
    if len(wrong):
        raise UserError(
            f"data.source.repeats: found {exact[wrong[0]] / HUNDRED:g}, expected 0.01 or more, with at most "
            f"two decimals, such as {max(rounded[wrong[0]], 1) / HUNDRED:g}"
        )
    return rounded.astype(np.int64)


def _check(batch_size: int, own: int, entries: int, beside: Beside | None) -> None:
    if own > entries:
        of_others = "" if beside is None else f", {own} of them no class pictures"
        raise UserError(
            f"train.batch_size: {batch_size} pictures in a batch{of_others}, but an epoch has only "
            f"{entries}; take at most that, or raise data.source.repeats"
        )
    if beside is not None and batch_size < 2:
        raise UserError("train.batch_size: found 1; with class pictures expected at least 2, half of each")


def _before(counts: Ints) -> Ints:
    """How many there are before each."""
    return np.cumsum(counts) - counts
