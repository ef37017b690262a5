"""Batches, drawn as functions of (seed, epoch, position) and cut out of the plan for one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tuner import counted
from tuner.batch import Batch
from tuner.data import conditions, holes, pictures
from tuner.data.cache import Store
from tuner.data.captions import CaptionRule
from tuner.data.noise import Draws
from tuner.data.plan import Plan, Slot, share
from tuner.data.sources import Sample
from tuner.errors import UserError
from tuner.family import Moments
from tuner.text import Text, Tokens

Picture = pictures.Picture


@dataclass(frozen=True)
class Latents:
    """Shape of the latents and the cache they are read from, if they are cached."""

    channels: int
    factor: int
    store: Store | None = None
    names: Sequence[tuple[str, str]] = ()  # for each sample, its entry as it is and mirrored


POOLED = "{} pooled"
"""The name of the pooled encoding that belongs to a caption's entry in the cache."""


@dataclass(frozen=True)
class Texts:
    """How captions become tokens, and the cache of their encodings, if they are cached."""

    tokenize: Callable[[Sequence[str]], Tokens] | None
    store: Store | None = None
    name: Callable[[str], str] | None = None  # caption -> entry
    pooled: bool = False  # each entry has one of the pooled encoding beside, named by POOLED


@dataclass(frozen=True)
class Feed:
    """Everything that turns a slot of the plan into a training sample; goes to the loader's workers.

    Attributes:
        condition: a kind of condition, `image` for given condition pictures, None for none.
        flip: mirror half of the samples; crop: `center` or `random`.
        u: overrides the timestep's random number, for the fixed grid of the validation.
        sizes: the denoiser is told each picture's size and crop.
        holes: an inpainting base fills a part of each picture, drawn at random.
        draws: how noise and timesteps are drawn.
    """

    samples: Sequence[Sample]
    size: int
    seed: int
    captions: CaptionRule
    latents: Latents
    texts: Texts
    condition: str | None = None
    flip: bool = False
    crop: str = "center"
    u: Callable[[Slot], float] | None = None
    sizes: bool = False
    holes: bool = False
    draws: Draws = Draws()

    def transform(self, slot: Slot) -> pictures.Transform:
        """The geometric transform of a sample, for its picture and its condition alike."""
        at = (self.seed, slot.epoch, slot.position)
        flip = self.flip and counted.uniform(*at, "flip") < 0.5
        if self.crop == "random":
            return pictures.Transform(
                self.size, counted.uniform(*at, "crop across"), counted.uniform(*at, "crop down"), flip
            )
        return pictures.Transform(self.size, flip=flip)

    def caption(self, slot: Slot) -> str:
        """The caption that is trained with."""
        sample = self.samples[slot.sample]
        if sample.fixed:
            return sample.captions[0]
        return self.captions(sample.captions, self.seed, slot.epoch, slot.position)

    def picture(self, slot: Slot) -> Picture:
        """The pixels that are trained on, uint8 [size, size, 3]."""
        return self.transform(slot)(pictures.load(self.samples[slot.sample].path))

    def condition_picture(self, slot: Slot, picture: Picture | None) -> Picture:
        """The condition of a sample, uint8 [size, size, 3], aligned with picture()."""
        assert self.condition is not None
        sample = self.samples[slot.sample]
        if self.condition != "image":
            return conditions.maker(self.condition)(self.picture(slot) if picture is None else picture)
        if sample.condition is None:
            raise UserError(f"{sample.path}: no conditioning_image, which condition: image asks for")
        condition = pictures.load(sample.condition)
        (wide, high), (height, width) = pictures.size(sample.path), condition.shape[:2]
        if abs(wide * height - width * high) > max(
            wide, high, width, height
        ):  # a pixel's rounding is none of the user's
            raise UserError(
                f"{sample.condition}: {width}x{height} pixels do not fit the picture's {wide}x{high}"
            )
        return self.transform(slot)(condition)

    def batch(self, slots: Sequence[Slot], total: float) -> Batch:
        """The batch of some slots; `total` is the sum of weights of the whole optimiser step."""
        cached = self.latents.store is not None
        pixels = None if cached else [self.picture(slot) for slot in slots]
        condition = None
        if self.condition is not None:
            made = [
                self.condition_picture(s, None if pixels is None else pixels[i]) for i, s in enumerate(slots)
            ]
            condition = torch.from_numpy(np.stack([pictures.to_unit(p) for p in made]))
        captions = tuple(self.caption(slot) for slot in slots)
        side = self.size // self.latents.factor
        shape = (self.latents.channels, side, side)
        noise = self._noise(shape, slots)
        return Batch(
            names=tuple(str(self.samples[s.sample].path) for s in slots),
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
            sizes=self._sizes(slots) if self.sizes else None,
            hole=self._holes(slots) if self.holes else None,
            input_noise=self._input_noise(noise, slots),
        )

    def _u(self, slot: Slot) -> float:
        if self.u is not None:
            return self.u(slot)
        return self.draws.u(self.seed, slot.epoch, slot.position)

    def _noise(self, shape: tuple[int, int, int], slots: Sequence[Slot]) -> torch.Tensor:
        drawn = [self.draws.noise(shape, self.seed, s.epoch, s.position) for s in slots]
        return torch.from_numpy(np.stack(drawn))

    def _input_noise(self, noise: torch.Tensor, slots: Sequence[Slot]) -> torch.Tensor | None:
        if not self.draws.input_perturbation:
            return None
        of = zip(noise.numpy(), slots, strict=True)
        drawn = [self.draws.input_noise(one, self.seed, s.epoch, s.position) for one, s in of]
        return torch.from_numpy(np.stack(drawn))

    def _sizes(self, slots: Sequence[Slot]) -> torch.Tensor:
        """Of each sample height and width of its file, top and left of the crop, height and width [B, 6]."""
        told = []
        for slot in slots:
            wide, high = pictures.size(self.samples[slot.sample].path)
            told.append([high, wide, *self.transform(slot).seen(high, wide), self.size, self.size])
        return torch.tensor(told, dtype=torch.float32)

    def _holes(self, slots: Sequence[Slot]) -> torch.Tensor:
        drawn = [holes.draw(self.size, self.seed, s.epoch, s.position) for s in slots]
        return torch.from_numpy(np.stack(drawn))

    def _normal(self, shape: tuple[int, ...], slots: Sequence[Slot], purpose: str) -> torch.Tensor:
        drawn = [counted.normal(shape, self.seed, s.epoch, s.position, purpose) for s in slots]
        return torch.from_numpy(np.stack(drawn))

    def _moments(self, slots: Sequence[Slot]) -> Moments:
        assert self.latents.store is not None
        names = [self.latents.names[s.sample][self.transform(s).flip] for s in slots]
        both = torch.stack([self.latents.store.read(name) for name in names])
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

    def __init__(self, feed: Feed, plan: Plan, division: Division) -> None:
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
    feed: Feed, plan: Plan, division: Division, start: int, stop: int, workers: int, pin: bool = False
) -> Iterator[Batch]:
    """The micro-batches of steps start..stop-1 of one process, in order; start > 0 continues a run.

    Raises:
        UserError: a sample cannot be read.
    """
    wanted = range(start * division.accumulate, stop * division.accumulate)
    loader: DataLoader[Batch | UserError] = DataLoader(
        _Steps(feed, plan, division), batch_size=None, sampler=wanted, num_workers=workers, pin_memory=pin
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item
