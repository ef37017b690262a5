"""Samples that pass once: shards in a drawn order, shuffled in a buffer, split by process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from tuner import counted
from tuner.data.samples import Sample, Say
from tuner.data.sources.retry import Broken, Patience
from tuner.data.sources.spec import SourceSpec
from tuner.errors import UserError


class Fault(NamedTuple):
    """A sample that cannot be used, and why."""

    problem: str


class Shards(Protocol):
    """The parts of a set that are read in one go."""

    place: str

    @property
    def count(self) -> int:
        """How many there are."""

    def name(self, shard: int) -> str:
        """What messages call one."""

    def read(self, shard: int, skip: int) -> Iterator[Sample | Fault]:
        """The samples of one in their order, without the first `skip`; raises Broken."""


class Passed(NamedTuple):
    """A sample on its way.

    Attributes:
        position: in the epoch; no other sample of the epoch has it, on any process.
    """

    sample: Sample
    epoch: int
    position: int


class Stream:
    """A source that is read in passing, each time in another order.

    The order is a function of (seed, epoch, rank, processes): the shards' order is drawn, shards are dealt to
    the processes in turn (or, where there are fewer shards than processes, each process reads all and takes
    every n-th sample), and `buffer` samples wait, of which one is drawn whenever another comes in.

    Attributes:
        allowed: how many samples that cannot be used are left out and told, before it is an error.
    """

    def __init__(self, shards: Shards, spec: SourceSpec, say: Say, source: int, allowed: int = 0) -> None:
        self.shards, self.place, self.say, self.source = shards, spec.path, say, source
        self.repeats, self.weight, self.buffer = spec.repeats, spec.weight, spec.buffer
        self.allowed, self._left_out = allowed, 0

    def problems(self) -> Iterator[str]:
        """Nothing is known before it passes; what cannot be used is an error then."""
        return iter(())

    def forever(self, seed: int, epoch: int = 0, rank: int = 0, processes: int = 1) -> Iterator[Passed]:
        """One process's samples from an epoch on, without end: processes need not have equally many.

        Raises:
            UserError: a sample cannot be used, a connection stays broken, or there are no samples.
        """
        while True:
            position = -1
            for position, sample in enumerate(self.epoch(seed, epoch, rank, processes)):
                yield Passed(sample, epoch, position * processes + rank)
            if position < 0:
                raise UserError(f"{self.place}: no samples for process {rank} of {processes}")
            epoch += 1

    def epoch(self, seed: int, epoch: int, rank: int = 0, processes: int = 1) -> Iterator[Sample]:
        """One process's samples of one epoch, each as often as the source is repeated.

        Raises:
            UserError: a sample cannot be used, or a connection stays broken.
        """
        assert 0 <= rank < processes
        for turn in range(epoch * self.repeats, (epoch + 1) * self.repeats):
            yield from self._shuffled(seed, turn, rank, processes)

    def _shuffled(self, seed: int, turn: int, rank: int, processes: int) -> Iterator[Sample]:
        waiting: list[Sample] = []
        for number, sample in enumerate(self._dealt(seed, turn, rank, processes)):
            if len(waiting) < self.buffer:
                waiting.append(sample)
                continue
            drawn = counted.choice(self.buffer, seed, turn, number * processes + rank, "stream buffer")
            yield waiting[drawn]
            waiting[drawn] = sample
        for index in counted.permutation(len(waiting), seed, turn, f"stream rest {rank} of {processes}"):
            yield waiting[index]

    def _dealt(self, seed: int, turn: int, rank: int, processes: int) -> Iterator[Sample]:
        order = [int(shard) for shard in counted.permutation(self.shards.count, seed, turn, "stream shards")]
        if len(order) >= processes:
            for shard in order[rank::processes]:
                yield from self._read(shard)
        else:
            every = (sample for shard in order for sample in self._read(shard))
            yield from (sample for number, sample in enumerate(every) if number % processes == rank)

    def _read(self, shard: int) -> Iterator[Sample]:
        patience = Patience(self.shards.name(shard), self.say)
        done = 0
        while True:
            try:
                for found in self.shards.read(shard, done):
                    done += 1
                    patience.reset()
                    if isinstance(found, Fault):
                        self._leave_out(found)
                    else:
                        yield found._replace(weight=found.weight * self.weight, source=self.source)
                return
            except Broken as error:
                patience.after(error)

    def _leave_out(self, fault: Fault) -> None:
        self._left_out += 1
        if self._left_out > self.allowed:
            more = f" ({self._left_out} samples of this kind, {self.allowed} allowed)" if self.allowed else ""
            raise UserError(fault.problem + more)
        self.say(f"left out: {fault.problem}")
