"""Edges as ControlNets take them, and how well one picture's edges match another's."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from tuner.data.conditions.canny import HIGH, LOW

Edges = npt.NDArray[np.uint8]

SMOOTHING = 1.0  # standard deviation in pixels of the blur before edges that are only measured


def canny(image: npt.NDArray[np.uint8], smooth: bool = False) -> Edges:
    """The edges of a picture: uint8 [H, W, 3], RGB -> uint8 [H, W], 255 on an edge and 0 elsewhere.

    smooth: blur lightly first, against noise that a reader would not see as edges. For measuring only: a
    condition is never smoothed. Raises ValueError for other arrays.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"edges are found in uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if smooth:
        image = np.asarray(cv2.GaussianBlur(image, (0, 0), SMOOTHING), np.uint8)
    return np.asarray(cv2.Canny(np.ascontiguousarray(image), LOW, HIGH), np.uint8)


def _share(of: npt.NDArray[np.bool_], near: Edges, tolerance: int) -> float:
    """The share of the pixels of `of` with a pixel of `near` at most `tolerance` rows and columns away."""
    if tolerance:
        near = np.asarray(cv2.dilate(near, np.ones((3, 3), np.uint8)), np.uint8)
    return float((near[of] > 0).mean()) if of.any() else 0.0


def edge_f1(found: Edges, wanted: Edges, tolerance: Literal[0, 1] = 1) -> float:
    """The F1 of edge pixels, in [0, 1]: harmonic mean of precision and recall.

    found, wanted: [H, W], edges where not 0. tolerance: pixels (in a 3x3 neighbourhood) that an edge may lie
    aside and still count. Two pictures without edges agree fully (1.0); one against none is 0.0.
    Raises ValueError when the sizes differ or the tolerance is neither 0 nor 1.
    """
    if found.shape != wanted.shape or found.ndim != 2:
        raise ValueError(f"edges of different sizes: {list(found.shape)} and {list(wanted.shape)}")
    if tolerance not in (0, 1):
        raise ValueError(f"the tolerance is 0 or 1 pixels, not {tolerance}")
    a, b = np.asarray(found > 0, np.uint8), np.asarray(wanted > 0, np.uint8)
    if not a.any() and not b.any():
        return 1.0
    precision, recall = _share(a > 0, b, tolerance), _share(b > 0, a, tolerance)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
