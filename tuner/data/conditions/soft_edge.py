"""Soft edges: the gradient of the smoothed picture. A formula, not a network: it is not HED or PiDiNet."""

from __future__ import annotations

import math

import cv2
import numpy as np
from pydantic import Field

from tuner.data.conditions._seam import Amount, Draw, Kind, Picture, three


class Config(Kind):
    """How wide and how bright edges are."""

    sigma: Amount = Field(
        1.5, description="deviation of the smoothing, in pixels; [a, b]: drawn from there for each sample"
    )
    gamma: float = Field(
        0.7, gt=0, description="power of the edges' strength; below 1 the faint ones are brighter"
    )


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> uint8 [H, W, 3], brighter on stronger edges.

    255 * min(1, sqrt(2 pi) * sigma * m / 255) ** gamma, where m is the greatest length of the gradient (by
    central differences) among the three channels of the picture smoothed by a Gaussian. Without the power, a
    straight edge between 0 and 255 comes to 1 on its ridge, whatever sigma is: the Gaussian's peak is
    1 / (sqrt(2 pi) * sigma). The scale does not depend on the picture.
    """
    sigma = draw.number(config.sigma, "sigma")
    smooth = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), sigma)
    across = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=1, scale=0.5)
    down = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=1, scale=0.5)
    steepest = np.sqrt(across**2 + down**2).max(axis=2)
    strength = np.minimum(1.0, math.sqrt(2 * math.pi) * sigma * steepest / 255) ** config.gamma
    return three(np.rint(255 * strength).astype(np.uint8))
