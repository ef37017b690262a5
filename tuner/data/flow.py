"""Training from what is read in passing: micro-batches in the order in which samples come."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, islice, product
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from tuner import counted, signals
from tuner.batch import Batch
from tuner.data import loader
from tuner.data.buckets import Bucket, Buckets
from tuner.data.loader import Division, Feed
from tuner.data.passing import Gate, UnusableError
from tuner.data.plan import Plan, Slot, Stages, share
from tuner.data.samples import Sample, Say
from tuner.data.sources.stream import LeftOut, Stream
from tuner.data.transform import Transform
from tuner.errors import UserError


class EndedError(UserError):
    """What is read in passing broke off; what was trained until then is whole."""


class Arrival(NamedTuple):
    """A sample that came, and where it belongs.

    Attributes:
        slot: its place; `slot.sample` has no meaning.
        size: height and width of its picture, in pixels.
    """

    sample: Sample
    slot: Slot
    size: tuple[int, int]


class Flow:
    """Stands for a Plan where samples pass instead of lying somewhere.

    Which samples a process sees is a function of (seed, rank, processes): of several streams one is drawn for
    each sample, by their shares. A sample waits with others of its bucket until they are a micro-batch;
    all are full, as there is no end. At one step processes may have different buckets. All draws of a sample
    are counted by its epoch and position, as everywhere.

    The mean of a step's loss is over `batch_size`: what others weigh is not known to a process, so weights
    are relative to 1. A picture that turns out to be damaged when it is decoded has a place of weight 0.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        shares: Sequence[float],
        buckets: Sequence[Buckets],
        gate: Gate,
        batch_size: int,
        seed: int,
    ) -> None:
        """
        Args:
            streams: what is read.
            shares: above 0, of any sum, how much of all samples each gives.
            buckets: of each stream.
            gate: what samples have to have.
            batch_size: pictures in one optimiser step.
        """
        assert len(streams) == len(shares) == len(buckets) > 0
        self.streams, self.shares, self.buckets = tuple(streams), tuple(shares), tuple(buckets)
        self.gate, self.batch_size, self.seed = gate, batch_size, seed
        self._areas = max(len(one.sides) for one in buckets)
        self.halted: Event | None = None  # set where nobody waits for more
        self.tell(print, 0)

    def tell(self, say: Say, unreadable: int, listed: Path | None = None) -> None:
        """Where lines for the user go, how many samples of this process may be left out, and the file that
        lists them."""
        self.say, self.left_out = say, LeftOut(unreadable, say, listed)
        self._counts: Counter[str] = Counter()
        for stream in self.streams:
            stream.say, stream.left_out = say, self.left_out

    def digest(self) -> str:
        """A hash over what names the bytes of all streams; raises UserError where they cannot be asked."""
        return hashlib.sha256("".join(stream.digest() for stream in self.streams).encode()).hexdigest()

    def words(self, steps: int) -> str:
        """What a run of so many steps sees."""
        places = ", ".join(stream.place for stream in self.streams)
        return f"{places} read in passing, {steps} steps of {self.batch_size} pictures"

    def pictures(self, step: int) -> int:
        """How many pictures a step sees."""
        return self.batch_size

    def arrivals(self, rank: int, processes: int) -> Iterator[Arrival]:
        """One process's samples in their order, without end, each once for every area.

        Raises:
            UserError: a sample cannot be used, or a connection stays broken.
        """
        every = [stream.forever(self.seed, 0, rank, processes) for stream in self.streams]
        for number in count(rank, processes):
            many = len(every) > 1
            if self.halted is not None and self.halted.is_set():
                return
            which = counted.choice(self.shares, self.seed, 0, number, "stream") if many else 0
            sample, epoch, position = next(every[which])
            try:
                height, width, cut, frames = self.gate(sample)
            except UnusableError as error:
                self.left_out(str(error))
                continue
            if cut is not None:
                self._tell("a caption was longer than base.windows read, and cut", cut)
            if frames > 1:
                self._tell("a picture had several frames, of which the first is used", sample.picture.name)
            try:
                shapes = self.buckets[which].every(height, width)
            except UserError as error:
                raise UserError(f"{sample.picture.name}: {error}") from error
            if any(Transform(*shape).scale(height, width) > 1 for shape in shapes):
                self._tell("a picture was enlarged", f"{sample.picture.name}, {width}x{height}")
            first = (position * len(every) + which) * self._areas
            for nth, bucket in enumerate(shapes):
                slot = Slot(0, epoch, first + nth, sample.weight, bucket)
                yield Arrival(sample, slot, (height, width))

    def micro_batches(self, division: Division) -> Iterator[list[Arrival]]:
        """One process's micro-batches, without end, each of one bucket; raises as arrivals()."""
        size, rest = divmod(self.batch_size, division.accumulate * division.processes)
        assert rest == 0, "the batch can be divided"
        waiting: dict[Bucket | None, list[Arrival]] = {}
        for arrival in self.arrivals(division.rank, division.processes):
            those = waiting.setdefault(arrival.slot.bucket, [])
            those.append(arrival)
            if len(those) == size:
                yield waiting.pop(arrival.slot.bucket)

    def batches(self, feed: Feed, division: Division, start: int, stop: int) -> Iterator[Batch]:
        """The micro-batches of steps start..stop-1 of one process.

        To start later is to read what comes before, without decoding it.

        Args:
            feed: how samples are made a batch of; it has none of its own.

        Raises:
            UserError: a sample cannot be used, or a connection stays broken.
        """
        if start:
            self.say(f"passing over what was trained on in {start} steps")
        first, left = start * division.accumulate, (stop - start) * division.accumulate
        nothing = 0  # micro-batches of which no picture can be decoded
        for arrivals in islice(self.micro_batches(division), first, None) if left else ():
            batch = self._batch(feed, arrivals)
            if batch is None:
                nothing += 1
                continue
            empty = replace(batch, weight=torch.zeros_like(batch.weight))
            made = [*[empty] * nothing, batch][:left]
            left, nothing = left - len(made), 0
            yield from made
            if not left:
                return

    def part(self, feed: Feed, division: Division, step: int, micro: int) -> tuple[list[Slot], Batch] | None:
        """A micro-batch once more, from the beginning on; None where nothing of it can be decoded."""
        number = step * division.accumulate + micro
        arrivals = next(islice(self.micro_batches(division), number, None))
        batch = self._batch(feed, arrivals)
        if batch is None:
            return None
        weights = zip(arrivals, batch.weight.tolist(), strict=True)
        return [arrival.slot._replace(weight=weight) for arrival, weight in weights], batch

    def _batch(self, feed: Feed, arrivals: Sequence[Arrival]) -> Batch | None:
        """A micro-batch, in which the places of what cannot be decoded show others and do not count."""
        try:
            return self._made(feed, arrivals)
        except UserError:
            good: list[Arrival] = []
            for arrival in arrivals:
                try:
                    self._made(feed, [arrival])
                except UserError as error:
                    self.left_out(str(error))
                else:
                    good.append(arrival)
        if not good:
            return None
        fill = [one._replace(slot=one.slot._replace(weight=0.0)) for one in good]
        lacking = len(arrivals) - len(good)
        return self._made(feed, [*good, *(fill[i % len(fill)] for i in range(lacking))])

    def _made(self, feed: Feed, arrivals: Sequence[Arrival]) -> Batch:
        slots = [arrival.slot._replace(sample=i) for i, arrival in enumerate(arrivals)]
        views = replace(feed.views, samples=[arrival.sample for arrival in arrivals])
        sizes = None if feed.told is None else np.array([a.size for a in arrivals], np.int64)
        return replace(feed, views=views, told=sizes).batch(slots, float(self.batch_size))

    def _tell(self, what: str, line: str) -> None:
        """Say it the first time, the tenth, the hundredth ..."""
        self._counts[what] += 1
        if str(self._counts[what]).rstrip("0") == "1":
            self.say(f"{self._counts[what]} times {what}: {line}")


class _Passing(IterableDataset[Batch | UserError]):
    """Micro-batches of one process, for a loader; a user's mistake is handed over as a value."""

    def __init__(self, feed: Feed, flow: Flow, division: Division, start: int, stop: int) -> None:
        self.of = (feed, division, start, stop)
        self.flow = flow

    def __iter__(self) -> Iterator[Batch | UserError]:
        try:
            yield from self.flow.batches(*self.of)
        except UserError as error:
            yield UserError(str(error))


def parts(
    feed: Feed, plan: Plan | Stages | Flow, division: Division, step: int
) -> Iterator[tuple[int, int, Sequence[Slot], Batch]]:
    """A step's micro-batches once more, of all processes: its number, the process, its slots, the batch."""
    if isinstance(plan, Flow):
        for micro, rank in product(range(division.accumulate), range(division.processes)):
            made = plan.part(feed, replace(division, rank=rank), step, micro)
            if made is not None:
                yield micro, rank, *made
        return
    slots = plan.step(step)
    total = sum(slot.weight for slot in slots)
    for micro, rank in product(range(division.accumulate), range(division.processes)):
        mine = share(slots, micro, rank, division.accumulate, division.processes)
        yield micro, rank, mine, feed.batch(mine, total)


def batches(
    feed: Feed,
    plan: Plan | Stages | Flow,
    division: Division,
    start: int,
    stop: int,
    workers: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """The micro-batches of steps start..stop-1 of one process, in order; start > 0 continues a run.

    Raises:
        UserError: a sample cannot be read; EndedError where it is read in passing.
    """
    if not isinstance(plan, Flow):
        yield from loader.stream(feed, plan, division, start, stop, workers, pin)
        return
    assert workers <= 1, "samples come in one order"
    plan.halted = halted = multiprocessing.Event()
    through: DataLoader[Batch | UserError] = DataLoader(
        _Passing(feed, plan, division, start, stop),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=signals.ignore,
    )
    try:
        for item in through:
            if isinstance(item, UserError):
                raise EndedError(str(item))
            yield item
    finally:
        halted.set()  # a loading process may be far from its next micro-batch
        plan.halted = None


def begun(coming: Iterator[Batch]) -> Iterator[Batch]:
    """The same, of which the first is there: it may have to be waited for, behind all that has passed."""
    first = next(coming, None)
    return iter(()) if first is None else chain([first], coming)
