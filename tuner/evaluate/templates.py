"""Which shape a filled mask is: the best overlap with the world's outlines, turned and stretched a little."""

from __future__ import annotations

import functools
import itertools
import math

import cv2
import numpy as np
import numpy.typing as npt

from tuner.evaluate import outlines
from tuner.evaluate.world import SHAPES, UNNAMED

Mask = npt.NDArray[np.uint8]

SIDE = 64  # pixels of the square that masks are compared in
_ROOT_AREA = 28.0  # square root of a mask's area there, pixels
_ANGLES = (-18, -12, -6, 0, 6, 12, 18)
_ASPECTS = (0.9, 1.0, 1.1)
_GROWTHS = (0.0, 0.09)  # radii that a contour's stroke adds outside
_SHAPES = tuple(name for name in (*SHAPES, *UNNAMED) if name != "ring")  # a filled ring is a circle


def _drawn(shape: str, angle: float, aspect: float, rounding: float, growth: float) -> Mask:
    """A template: uint8 [SIDE, SIDE] of 0 and 1."""
    points = outlines.outline(shape)
    if shape in outlines.ANGULAR:
        points = outlines.rounded(points, rounding)
    a = math.radians(angle)
    turn = np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
    big = np.zeros((256, 256), np.uint8)
    placed = (points * [math.sqrt(aspect), 1 / math.sqrt(aspect)]) @ turn * 80 + 128
    fixed = [np.round(placed * 16).astype(np.int32)]
    cv2.fillPoly(big, fixed, 1, cv2.LINE_8, 4)
    if growth:
        cv2.polylines(big, fixed, True, 1, round(2 * growth * 80), cv2.LINE_8, 4)
    return normalised(big)


def normalised(mask: npt.NDArray[np.uint8]) -> Mask:
    """A mask [h, w] of 0 and 1, not empty, brought to common centroid and area: uint8 [SIDE, SIDE]."""
    moments = cv2.moments(mask, binaryImage=True)
    assert moments["m00"] > 0, "the mask is empty"
    x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    scale = _ROOT_AREA / math.sqrt(moments["m00"])
    middle = (SIDE - 1) / 2
    matrix = np.array([[scale, 0, middle - scale * x], [0, scale, middle - scale * y]])
    soft = cv2.warpAffine(mask * np.uint8(200), matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
    return np.asarray(soft > 100, np.uint8)


@functools.cache
def _bank() -> tuple[tuple[str, ...], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Every template's shape, its pixels [n, SIDE * SIDE] and its area [n]."""
    kinds = itertools.product(_SHAPES, _ANGLES, _ASPECTS, (0.0, 0.12), _GROWTHS)
    names, rows = [], []
    for shape, angle, aspect, rounding, growth in kinds:
        if rounding and shape not in outlines.ANGULAR:
            continue
        names.append(shape)
        rows.append(_drawn(shape, angle, aspect, rounding, growth).reshape(-1))
    pixels = np.stack(rows).astype(np.float32)
    return tuple(names), pixels, pixels.sum(axis=1)


def overlaps(mask: npt.NDArray[np.uint8]) -> dict[str, float]:
    """For each shape but the ring, the best intersection over union of a template with the mask, in [0, 1].

    mask: [h, w] of 0 and 1, not empty; place and scale do not matter.
    """
    names, pixels, areas = _bank()
    flat = normalised(mask).reshape(-1).astype(np.float32)
    common = pixels @ flat
    values = common / np.maximum(areas + flat.sum() - common, 1)
    best = dict.fromkeys(_SHAPES, 0.0)
    for name, value in zip(names, values.tolist(), strict=True):
        best[name] = max(best[name], value)
    return best
