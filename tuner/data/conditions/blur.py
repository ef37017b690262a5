"""The picture out of focus."""

from __future__ import annotations

import cv2
import numpy as np
from pydantic import Field

from tuner.data.conditions._seam import Amount, Draw, Kind, Picture


class Config(Kind):
    """How strong the blur is."""

    sigma: Amount = Field(
        6.0, description="deviation of the smoothing, in pixels; [a, b]: drawn from there for each sample"
    )


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> the same under a Gaussian of `sigma` pixels, mirrored at the borders."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), draw.number(config.sigma, "sigma")), np.uint8)
