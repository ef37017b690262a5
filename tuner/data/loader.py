"""Batches, drawn as functions of (seed, epoch, position) and cut out of the plan for one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from tuner import counted, signals
from tuner.batch import Batch
from tuner.data import conditions, holes, pictures
from tuner.data.cache import Store, key, keys
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.noise import Draws
from tuner.data.plan import Plan, Slot, Stages, share
from tuner.data.samples import Sample
from tuner.data.views import Picture, Seen, Views
from tuner.errors import UserError
from tuner.family import Moments
from tuner.text import Text, Tokens


@dataclass(frozen=True)
class Latents:
    """Shape of the latents and the cache they are read from, if they are cached.

    Attributes:
        digests: of each sample, its picture's; about: what else an entry depends on.
        entries: how many are in the cache for these samples.
    """

    channels: int
    factor: int
    store: Store | None = None
    digests: Sequence[str] = ()
    about: tuple[tuple[str, str], ...] = ()
    entries: int = 0

    def name(self, sample: int, shape: tuple[int, int], flip: bool) -> str:
        """The cache's entry of a sample at a height and width, as it is or mirrored."""
        return key(picture=self.digests[sample], **self._depends(shape, flip))

    def names(self, samples: Iterable[int], shape: tuple[int, int], flip: bool) -> list[str]:
        """Those of several samples; quicker than one after the other."""
        digests = (self.digests[sample] for sample in samples)
        return list(keys("picture", digests, **self._depends(shape, flip)))

    def _depends(self, shape: tuple[int, int], flip: bool) -> dict[str, object]:
        height, width = shape
        return {"height": height, "width": width, "crop": "center", "flip": flip, **dict(self.about)}


POOLED = "{} pooled"
"""The name of the pooled encoding that belongs to a caption's entry in the cache."""


@dataclass(frozen=True)
class Texts:
    """How captions become tokens, and the cache of their encodings, if they are cached."""

    tokenize: Callable[[Sequence[str]], Tokens] | None
    store: Store | None = None
    name: Callable[[str], str] | None = None  # caption -> entry
    pooled: bool = False  # each entry has one of the pooled encoding beside, named by POOLED
    entries: int = 0  # how many are in the cache for these samples


@dataclass(frozen=True)
class Feed:
    """Everything that turns a slot of the plan into a training sample; goes to the loader's workers.

    Attributes:
        views: how samples are looked at.
        captions: their rule; of_source: rules of single sources, by their number.
        u: overrides the timestep's random number, for the fixed grid of the validation.
        told: of each sample height and width of its picture, int64 [N, 2]: the denoiser is told these sizes
            and the crop; None: it is not.
        holes: an inpainting base fills a part of each picture, drawn at random.
        draws: how noise and timesteps are drawn.
        left_out: what is wrong with samples that were left out.
    """

    views: Views
    captions: CaptionRule
    latents: Latents
    texts: Texts
    of_source: tuple[tuple[int, CaptionRule], ...] = ()
    u: Callable[[Slot], float] | None = None
    told: npt.NDArray[np.int64] | None = None
    holes: bool = False
    draws: Draws = Draws()
    left_out: tuple[str, ...] = ()

    @property
    def samples(self) -> Sequence[Sample]:
        """What it makes batches of."""
        return self.views.samples

    @property
    def size(self) -> int:
        """Pixels of a side of the square."""
        return self.views.size

    @property
    def condition(self) -> Condition | None:
        """How conditions are made; None where there are none."""
        return self.views.condition

    def picture(self, slot: Slot) -> Picture:
        """The pixels that are trained on, uint8 [height, width, 3]."""
        return self.views.picture(slot)

    def condition_picture(self, slot: Slot, picture: Picture | None) -> Picture:
        """The condition of a sample, uint8 [height, width, 3 or 4], aligned with picture()."""
        return self.views.condition_picture(slot, picture)

    def caption(self, slot: Slot) -> str:
        """The caption that is trained with."""
        sample = self.samples[slot.sample]
        if sample.fixed:
            return sample.captions[0]
        rule = dict(self.of_source).get(sample.source, self.captions)
        return rule(sample.captions, self.views.seed, slot.epoch, slot.position, sample.kinds)

    def batch(self, slots: Sequence[Slot], total: float) -> Batch:
        """The batch of some slots of one bucket; `total`: the sum of weights of the whole optimiser step."""
        views, cached = self.views, self.latents.store is not None
        # A picture is decoded once for all that is made of it, and not at all where nothing is.
        seen = [views.seen(slot) for slot in slots] if self._decodes(cached) else [None] * len(slots)
        pixels = [views.picture(*both) for both in zip(slots, seen, strict=True)] if not cached else None
        condition = None
        if views.condition is not None:
            made = [self._condition(i, slot, seen[i], pixels) for i, slot in enumerate(slots)]
            condition = torch.from_numpy(np.stack(made))
        captions = tuple(self.caption(slot) for slot in slots)
        height, width = views.shape(slots[0])
        shape = (self.latents.channels, height // self.latents.factor, width // self.latents.factor)
        noise = self._noise(shape, slots)
        return Batch(
            names=tuple(self.samples[s.sample].picture.name for s in slots),
            captions=captions,
            weight=torch.tensor([s.weight for s in slots], dtype=torch.float32),
            total=total,
            u=torch.tensor([self._u(s) for s in slots], dtype=torch.float64),
            noise=noise,
            posterior=self._normal(shape, slots, "posterior"),
            pixels=None
            if pixels is None
            else torch.from_numpy(np.stack([pictures.to_signed(p) for p in pixels])),
            moments=self._moments(slots) if cached else None,
            tokens=self._tokens(captions),
            text=self._text(captions),
            condition=condition,
            sizes=None if self.told is None else self._sizes(slots, self.told),
            hole=self._holes(slots) if self.holes else None,
            input_noise=self._input_noise(noise, slots),
            mask=None if views.masks is None else self._masks(slots, seen),
        )

    def _decodes(self, cached: bool) -> bool:
        made = self.views.condition is not None and self.views.condition.kind != conditions.GIVEN
        return not cached or made or bool(self.views.of_source) or self.views.masks is not None

    def _condition(
        self, number: int, slot: Slot, seen: Seen | None, pixels: Sequence[Picture] | None
    ) -> npt.NDArray[np.float32]:
        given = self.views.condition_of(slot).kind == conditions.GIVEN
        picture = None if given else pixels[number] if pixels is not None else self.views.picture(slot, seen)
        return conditions.values(self.views.condition_picture(slot, picture))

    def _u(self, slot: Slot) -> float:
        if self.u is not None:
            return self.u(slot)
        return self.draws.u(self.views.seed, slot.epoch, slot.position)

    def _noise(self, shape: tuple[int, int, int], slots: Sequence[Slot]) -> torch.Tensor:
        drawn = [self.draws.noise(shape, self.views.seed, s.epoch, s.position) for s in slots]
        return torch.from_numpy(np.stack(drawn))

    def _input_noise(self, noise: torch.Tensor, slots: Sequence[Slot]) -> torch.Tensor | None:
        if not self.draws.input_perturbation:
            return None
        of = zip(noise.numpy(), slots, strict=True)
        drawn = [self.draws.input_noise(one, self.views.seed, s.epoch, s.position) for one, s in of]
        return torch.from_numpy(np.stack(drawn))

    def _sizes(self, slots: Sequence[Slot], sizes: npt.NDArray[np.int64]) -> torch.Tensor:
        """Of each sample height and width of its file, top and left of the crop, height and width [B, 6]."""
        told = [self.views.transform(slot).told(*sizes[slot.sample].tolist()) for slot in slots]
        return torch.tensor(told, dtype=torch.float32)

    def _holes(self, slots: Sequence[Slot]) -> torch.Tensor:
        drawn = [holes.draw(self.views.shape(s), self.views.seed, s.epoch, s.position) for s in slots]
        return torch.from_numpy(np.stack(drawn))

    def _masks(self, slots: Sequence[Slot], seen: Sequence[Seen | None]) -> torch.Tensor:
        factor = self.latents.factor
        made = [self.views.weights(slot, factor, one) for slot, one in zip(slots, seen, strict=True)]
        return torch.from_numpy(np.stack(made))

    def _normal(self, shape: tuple[int, ...], slots: Sequence[Slot], purpose: str) -> torch.Tensor:
        drawn = [counted.normal(shape, self.views.seed, s.epoch, s.position, purpose) for s in slots]
        return torch.from_numpy(np.stack(drawn))

    def _moments(self, slots: Sequence[Slot]) -> Moments:
        store, views = self.latents.store, self.views
        assert store is not None
        both = torch.stack(
            [store.read(self.latents.name(s.sample, views.shape(s), views.transform(s).flip)) for s in slots]
        )
        mean, std = both.chunk(2, dim=1)
        return Moments(mean, std)

    def _tokens(self, captions: Sequence[str]) -> Tokens | None:
        if self.texts.tokenize is None or self.texts.store is not None:
            return None
        return self.texts.tokenize(captions)

    def _text(self, captions: Sequence[str]) -> Text | None:
        store, name = self.texts.store, self.texts.name
        if store is None or name is None:
            return None
        names = [name(caption) for caption in captions]
        hidden = torch.stack([store.read(one) for one in names])
        pooled = [store.read(POOLED.format(one)) for one in names] if self.texts.pooled else None
        return Text(hidden, None if pooled is None else torch.stack(pooled))


class Waited(Iterator[Batch]):
    """Batches, and how much of the time they were waited for."""

    def __init__(self, batches: Iterator[Batch], clock: Callable[[], float] = time.monotonic) -> None:
        self._batches, self._clock = batches, clock
        self._since = self._begun = clock()
        self._now = self._before = 0.0  # seconds: since it was asked last, and before

    def __next__(self) -> Batch:
        start = self._clock()
        try:
            return next(self._batches)
        finally:
            self._now += self._clock() - start

    def lately(self) -> float:
        """The share of the time since it was asked last, or since the beginning: 0 to 1."""
        now = self._clock()
        passed, waited = now - self._since, self._now
        self._since, self._before, self._now = now, self._before + waited, 0.0
        return waited / passed if passed > 0 else 0.0

    def all(self) -> float:
        """The share of the whole time: 0 to 1."""
        passed = self._clock() - self._begun
        return (self._before + self._now) / passed if passed > 0 else 0.0


@dataclass(frozen=True)
class Division:
    """How a step's batch is divided."""

    accumulate: int = 1
    processes: int = 1
    rank: int = 0


class _Steps(Dataset[Batch | UserError]):
    """Micro-batches of one process, by (step, micro).

    A user's mistake is handed over as a value: raised in a worker it would arrive wrapped in a traceback.
    """

    def __init__(self, feed: Feed, plan: Plan | Stages, division: Division) -> None:
        self.feed, self.plan, self.division = feed, plan, division

    def __getitem__(self, index: int) -> Batch | UserError:
        step, micro = divmod(index, self.division.accumulate)
        slots = self.plan.step(step)
        mine = share(slots, micro, self.division.rank, self.division.accumulate, self.division.processes)
        try:
            return self.feed.batch(mine, sum(slot.weight for slot in slots))
        except UserError as error:
            return error


def stream(
    feed: Feed,
    plan: Plan | Stages,
    division: Division,
    start: int,
    stop: int,
    workers: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """The micro-batches of steps start..stop-1 of one process, in order; start > 0 continues a run.

    Raises:
        UserError: a sample cannot be read.
    """
    wanted = range(start * division.accumulate, stop * division.accumulate)
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Steps(feed, plan, division),
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=signals.ignore,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item
