"""Canny edges as the ControlNets in use expect them: white on black, not blurred, three equal channels."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from pydantic import Field

from tuner.block import Conflict
from tuner.data.conditions._seam import Amount, Draw, Kind, Picture, ends, three

LOW, HIGH = 100, 200


class Config(Kind):
    """The two thresholds on the gradient, in the units of cv2.Canny."""

    low: Amount = Field(float(LOW), description="edges go on above this gradient; [a, b]: drawn from there")
    high: Amount = Field(float(HIGH), description="edges begin above this gradient; [a, b]: drawn from there")

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from crossed(self.low, self.high)


def crossed(low: float | tuple[float, float], high: float | tuple[float, float]) -> Iterator[Conflict]:
    """A lower threshold that may come out above the upper one; OpenCV would exchange them silently."""
    most, least = ends(low)[1], ends(high)[0]
    if most > least:
        message = f"found up to {most:g}, and high goes down to {least:g}; expected low below high"
        yield Conflict(("low", "high"), message)


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> uint8 [H, W, 3], 255 on edges; J. Canny, IEEE PAMI 8(6), 1986, by OpenCV."""
    edges = cv2.Canny(picture, draw.number(config.low, "low"), draw.number(config.high, "high"))
    return three(np.asarray(edges, np.uint8))
