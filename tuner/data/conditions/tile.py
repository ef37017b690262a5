"""The picture without its details: made small, and large again, as ControlNets for tiles take it."""

from __future__ import annotations

from typing import ClassVar

import cv2
import numpy as np
from pydantic import Field

from tuner.data.conditions._seam import Amount, Draw, Kind, Picture


class Config(Kind):
    """How much detail is lost."""

    ABOVE: ClassVar[float] = 1

    factor: Amount = Field(
        8.0, description="how much smaller the picture is made, above 1; [a, b]: drawn for each sample"
    )


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> the same size, reduced by `factor` (means of areas) and enlarged (bicubic).

    Raises:
        ValueError: nothing is left of a side.
    """
    factor = draw.number(config.factor, "factor")
    height, width = picture.shape[:2]
    if min(height, width) < factor:
        raise ValueError(f"{width}x{height} pixels, made smaller {factor:g} times, leave nothing of a side")
    small = cv2.resize(picture, (round(width / factor), round(height / factor)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
