"""Samples that pass once: shards in a drawn order, shuffled in a buffer, split by process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from tuner import counted
from tuner.data.samples import Sample, Samples, Say, kinds
from tuner.data.sources.retry import Broken, Patience, retried
from tuner.data.sources.spec import SourceSpec
from tuner.disk import writing
from tuner.errors import UserError


class Fault(NamedTuple):
    """A sample that cannot be used, and why."""

    problem: str


class LeftOut:
    """Samples that cannot be used: told and left out up to a number, then an error.

    A sample that comes again, in the next epoch, is not counted again.
    """

    def __init__(self, allowed: int, say: Say, listed: Path | None = None) -> None:
        """`listed`: a file, which may be shared by processes, to which a line is added for each."""
        self.allowed, self.say, self.listed = allowed, say, listed
        self._problems: set[str] = set()

    def __call__(self, problem: str) -> None:
        """Leave one out.

        Raises:
            UserError: more than are allowed, or the list cannot be written.
        """
        if problem in self._problems:
            return
        self._problems.add(problem)
        if (count := len(self._problems)) > self.allowed:
            many = f"{count} sample{'s' if count > 1 else ''} cannot be used"
            may = f"{self.allowed} may be left out" if self.allowed else "N leaves out as many"
            raise UserError(f"{problem}\n{many}; data.unreadable: {may}")
        self.say(f"left out: {problem}")
        if self.listed is not None:
            self._list(self.listed, " ".join(problem.split()))

    def _list(self, place: Path, line: str) -> None:
        """Add a line, if it is not there: other processes and a run that went on may have met it before."""
        with writing(place):
            if place.is_file() and line in place.read_text(encoding="utf-8").splitlines():
                return
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{line}\n")


class Shards(Protocol):
    """The parts of a set that are read in one go.

    Attributes:
        place: the set as the recipe names it.
        masked: whether its samples have masks.
    """

    place: str
    masked: bool

    @property
    def count(self) -> int:
        """How many there are."""

    def name(self, shard: int) -> str:
        """What messages call one."""

    def read(self, shard: int, skip: int) -> Iterator[Sample | Fault]:
        """The samples of one in their order, without the first `skip`; raises Broken."""

    def identity(self) -> Iterator[str]:
        """What names the bytes of all of them: names and sizes, tags, a commit; raises Broken."""


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
        left_out: takes the samples that cannot be used; by default each is an error.
    """

    def __init__(self, shards: Shards, spec: SourceSpec, say: Say, source: int) -> None:
        self.shards, self.place, self.say, self.source = shards, spec.path, say, source
        self.weight, self.buffer = spec.weight, spec.buffer
        self.left_out = LeftOut(0, say)

    def problems(self) -> Iterator[str]:
        """Nothing is known before it passes; what cannot be used is an error then."""
        return iter(())

    def digest(self) -> str:
        """A hash over what names the bytes; nothing of them is read.

        Raises:
            UserError: they are not there, or a connection stays broken.
        """
        found = retried(lambda: list(self.shards.identity()), self.place, self.say)
        return hashlib.sha256(repr((self.place, found)).encode()).hexdigest()

    def first(self, count: int) -> list[Sample]:
        """The first samples in the order in which they lie.

        Raises:
            UserError: a sample cannot be used, or a connection stays broken.
        """
        every = (sample for shard in range(self.shards.count) for sample in self._read(shard))
        return list(islice(every, count))

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
        """One process's samples of one epoch.

        Raises:
            UserError: a sample cannot be used, or a connection stays broken.
        """
        assert 0 <= rank < processes
        waiting: list[Sample] = []
        for number, sample in enumerate(self._dealt(seed, epoch, rank, processes)):
            if len(waiting) < self.buffer:
                waiting.append(sample)
                continue
            drawn = counted.choice(self.buffer, seed, epoch, number * processes + rank, "stream buffer")
            yield waiting[drawn]
            waiting[drawn] = sample
        for index in counted.permutation(len(waiting), seed, epoch, f"stream rest {rank} of {processes}"):
            yield waiting[index]

    def _dealt(self, seed: int, epoch: int, rank: int, processes: int) -> Iterator[Sample]:
        order = [int(shard) for shard in counted.permutation(self.shards.count, seed, epoch, "stream shards")]
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
                        self.left_out(found.problem)
                    else:
                        whole = found.weight * self.weight
                        yield found._replace(weight=whole, source=self.source, kinds=kinds(found))
                return
            except Broken as error:
                patience.after(error)


class First(Samples):
    """The first samples of a stream in the order in which they lie, held in memory."""

    def __init__(self, stream: Stream, count: int) -> None:
        """Raises UserError: a sample cannot be used, or a connection stays broken."""
        self._held = stream.first(count)
        super().__init__(stream.place, len(self._held), 1, 1.0, stream.source)

    def one(self, index: int) -> Sample:
        """A sample; the stream's weight is multiplied in."""
        return self._held[index]
