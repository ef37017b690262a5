"""What is seen of a sample: its picture, condition and mask, cut alike, as a slot of the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from tuner import counted
from tuner.block import Block
from tuner.data import conditions, pictures
from tuner.data.blob import Blob
from tuner.data.conditions import Condition, Draw
from tuner.data.jitter import Jitter
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.transform import Transform, check_fits
from tuner.errors import UserError

Picture = npt.NDArray[np.uint8]


class Masks(Block):
    """How the masks of pictures weigh the loss."""

    outside: float = Field(
        0.0, ge=0, lt=1, description="weight where a mask is black; where it is white it is 1"
    )
    normalise: bool = Field(True, description="a picture counts the same however much of it the mask covers")


class Seen(NamedTuple):
    """A decoded sample."""

    picture: Picture  # uint8 [H, W, 3], as its file has it
    mask: Picture | None  # uint8 [h, w], of the same shape; its size may be another


@dataclass(frozen=True)
class Views:
    """How samples are looked at.

    Attributes:
        size: of the square that is trained at, in pixels, where a slot has no bucket.
        crop: `center` or `random`; flip: mirror half of the samples.
        condition: how conditions are made, or that they are given; None: none are wanted.
        of_source: conditions of single sources, by their number.
        masks: None: masks are not looked at.
    """

    samples: Sequence[Sample]
    size: int
    seed: int
    crop: str = "center"
    flip: bool = False
    condition: Condition | None = None
    of_source: tuple[tuple[int, Condition], ...] = ()
    reading: pictures.Reading = pictures.Reading()
    masks: Masks | None = None
    jitter: Jitter | None = None

    def shape(self, slot: Slot) -> tuple[int, int]:
        """Height and width that a slot's sample is trained at."""
        return (self.size, self.size) if slot.bucket is None else (slot.bucket.height, slot.bucket.width)

    def transform(self, slot: Slot) -> Transform:
        """The geometric transform of a sample, for its picture, its condition and its mask alike."""
        at = (self.seed, slot.epoch, slot.position)
        flip = self.flip and counted.uniform(*at, "flip") < 0.5
        if self.crop == "random":
            across, down = counted.uniform(*at, "crop across"), counted.uniform(*at, "crop down")
            return Transform(*self.shape(slot), across, down, flip)
        return Transform(*self.shape(slot), flip=flip)

    def seen(self, slot: Slot) -> Seen:
        """A sample's picture and mask as their files have them."""
        sample = self.samples[slot.sample]
        picture, mask, _ = pictures.decode(sample.picture.read(), sample.picture.name, self.reading)
        if self.masks is not None and sample.mask is not None:
            given = self._read(sample.mask)
            check_fits(sample.mask.name, given.shape[:2], picture.shape[:2])
            mask = cv2.cvtColor(given, cv2.COLOR_RGB2GRAY).astype(np.uint8)
        return Seen(picture, mask)

    def picture(self, slot: Slot, seen: Seen | None = None) -> Picture:
        """The pixels that are trained on, uint8 [height, width, 3]."""
        cut = self.transform(slot)((seen or self.seen(slot)).picture)
        return cut if self.jitter is None else self.jitter(cut, self.seed, slot.epoch, slot.position)

    def condition_of(self, slot: Slot) -> Condition:
        """How a sample's condition is made."""
        assert self.condition is not None
        return dict(self.of_source).get(self.samples[slot.sample].source, self.condition)

    def condition_picture(self, slot: Slot, picture: Picture | None) -> Picture:
        """The condition of a sample, uint8 [height, width, 3 or 4], aligned with picture().

        Args:
            picture: what picture() gives, where it is at hand.
        """
        how, sample = self.condition_of(slot), self.samples[slot.sample]
        if how.kind != conditions.GIVEN:
            looked = self.picture(slot) if picture is None else picture
            draw = Draw(self.seed, slot.epoch, slot.position)
            return conditions.make_condition(how, looked, draw, sample.picture.name)
        if sample.condition is None:
            raise UserError(f"{sample.picture.name}: no conditioning_image, which condition: image asks for")
        given = self._read(sample.condition)
        about = pictures.facts(sample.picture.read(), sample.picture.name, self.reading)
        check_fits(sample.condition.name, given.shape[:2], (about.height, about.width))
        return self.transform(slot)(given, of=(about.height, about.width))

    def _read(self, blob: Blob) -> Picture:
        """A condition or a mask; its alpha is no mask."""
        return pictures.decode(blob.read(), blob.name, replace(self.reading, alpha="composite")).picture

    def weights(self, slot: Slot, factor: int, seen: Seen | None = None) -> npt.NDArray[np.float32]:
        """How much each place of the latents counts, float32 [1, height / factor, width / factor].

        Each is the mean of what the mask has there; 1 everywhere without a mask. Normalised, the mean over
        the picture is 1.

        Raises:
            UserError: a mask that leaves nothing.
        """
        height, width = (side // factor for side in self.shape(slot))
        picture, mask = seen or self.seen(slot)
        if self.masks is None or mask is None:
            return np.ones((1, height, width), np.float32)
        cut = self.transform(slot)(mask, by="area", of=(picture.shape[0], picture.shape[1]))
        share = cut.reshape(height, factor, width, factor).mean(axis=(1, 3), dtype=np.float64) / 255
        weight = self.masks.outside + (1 - self.masks.outside) * share
        mean = weight.mean()
        if mean <= 0:
            sample = self.samples[slot.sample]
            name = (sample.picture if sample.mask is None else sample.mask).name
            raise UserError(f"{name}: the mask leaves nothing of the picture, and data.masks.outside is 0")
        made: npt.NDArray[np.float32] = (weight / mean if self.masks.normalise else weight).astype(np.float32)
        return made[None]
