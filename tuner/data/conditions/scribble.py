"""Scribbles: the picture's main edges as strokes of a pen, white on black; with width 1 a line drawing."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
from pydantic import Field

from tuner.block import Conflict
from tuner.data.conditions._seam import Amount, Draw, Kind, Picture, three
from tuner.data.conditions.canny import crossed


class Config(Kind):
    """Which edges are drawn, and how thick."""

    sigma: Amount = Field(
        2.0, description="deviation of the smoothing, in pixels; [a, b]: drawn from there for each sample"
    )
    low: Amount = Field(40.0, description="edges go on above this gradient; [a, b]: drawn from there")
    high: Amount = Field(100.0, description="edges begin above this gradient; [a, b]: drawn from there")
    width: Amount = Field(3.0, description="of a stroke, in pixels; [a, b]: drawn from there")

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        yield from crossed(self.low, self.high)


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> uint8 [H, W, 3], 255 on strokes.

    The smoothed picture's Canny edges, which are one pixel thin, dilated by a disc of `width` pixels.
    """
    smooth = cv2.GaussianBlur(picture, (0, 0), draw.number(config.sigma, "sigma"))
    thin = cv2.Canny(smooth, draw.number(config.low, "low"), draw.number(config.high, "high"))
    width = max(1, round(draw.number(config.width, "width")))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    return three(np.asarray(cv2.dilate(thin, disc), np.uint8))
