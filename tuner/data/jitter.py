"""Colours changed at random, each time that a picture comes."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from tuner import counted
from tuner.block import Block, Conflict

Picture = npt.NDArray[np.uint8]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
HALF_TURN = 0.5


class Jitter(Block):
    """How far colours are changed at random; cached encodings cannot follow, so pictures are encoded anew."""

    brightness: float = Field(0.0, ge=0, lt=1, description="factor drawn from 1 - x to 1 + x")
    contrast: float = Field(
        0.0, ge=0, lt=1, description="factor of the distance from the mean grey, as above"
    )
    saturation: float = Field(0.0, ge=0, le=1, description="factor of the distance from grey, as above")
    hue: float = Field(0.0, ge=0, le=HALF_TURN, description="turn of the colour circle drawn from -x to x")

    def conflicts(self) -> Iterator[Conflict]:
        """Nothing that is changed."""
        if not any(dict(self).values()):
            yield Conflict(("brightness",), "found 0, as all others: expected one of them above 0")

    def __call__(self, picture: Picture, seed: int, epoch: int, position: int) -> Picture:
        """uint8 RGB [H, W, 3] with its colours changed as (seed, epoch, position) says, in one order.

        Brightness is a factor, contrast one about the picture's mean grey, saturation one about each pixel's
        grey; hue turns the circle of HSV.
        """
        drawn = {
            key: value * (2 * counted.uniform(seed, epoch, position, f"jitter {key}") - 1)
            for key, value in dict(self).items()
            if value
        }
        look = picture.astype(np.float32) * np.float32(1 + drawn.get("brightness", 0.0))
        if "contrast" in drawn:
            mean = (look @ LUMA).mean()
            look = mean + (look - mean) * np.float32(1 + drawn["contrast"])
        if "saturation" in drawn:
            grey = (look @ LUMA)[:, :, None]
            look = grey + (look - grey) * np.float32(1 + drawn["saturation"])
        look = np.clip(look, 0, 255)
        if "hue" in drawn:
            circle = cv2.cvtColor(look / 255, cv2.COLOR_RGB2HSV)
            circle[:, :, 0] = (circle[:, :, 0] + np.float32(360 * drawn["hue"])) % 360
            look = cv2.cvtColor(circle, cv2.COLOR_HSV2RGB) * 255
        changed: Picture = np.rint(look).astype(np.uint8)
        return changed
