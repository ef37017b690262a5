"""A coarse grid of colours, as T2I-Adapter's colour model takes it (arXiv 2302.08453): 8x8 of 512x512."""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field

from tuner.data.conditions._seam import Amount, Draw, Kind, Picture


class Config(Kind):
    """How coarse the grid is."""

    cell: Amount = Field(
        64.0, description="side of a cell, in pixels; [a, b]: drawn from there for each sample"
    )


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> the same size, in whole cells of about `cell` pixels, each of one colour.

    A cell has the mean of its area. (T2I-Adapter's own tool takes a bicubic sample of some of its pixels.)

    Raises:
        ValueError: a side is shorter than a cell.
    """
    cell = draw.number(config.cell, "cell")
    height, width = picture.shape[:2]
    if min(height, width) < cell:
        raise ValueError(f"{width}x{height} pixels have no room for a cell of {cell:g}; set cell lower")
    small = cv2.resize(picture, (int(width / cell), int(height / cell)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
