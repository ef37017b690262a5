"""The outlines of the shapes world: unit polygons, centred on the centroid of their filled area.

One unit is an object's radius; x points right and y down. Needs numpy alone.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]

_RING_HOLE = 0.5  # inner over outer radius


def _arc(start: float, stop: float, count: int, radius: float = 1.0) -> Points:
    angle = np.linspace(start, stop, count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _circle(radius: float) -> Points:
    return _arc(0.0, 2 * math.pi, 65, radius)[:-1]


def _star() -> Points:
    angle = -math.pi / 2 + np.arange(10) * math.pi / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.15, 0.52)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 65)[:-1]
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 16


def _crescent() -> Points:
    bite, offset = 0.82, 0.5  # a disc of this radius, moved right by this much, is taken from the unit disc
    x = (1 - bite**2 + offset**2) / (2 * offset)
    outer = math.acos(x)
    inner = math.atan2(math.sqrt(1 - x * x), x - offset)
    back = _arc(2 * math.pi - inner, inner, 25, bite) + np.array([offset, 0.0])
    return np.concatenate([_arc(outer, 2 * math.pi - outer, 49), back[1:-1]])


def _drop() -> Points:
    radius, centre, tip = 0.7, 0.35, -1.2
    tangent = math.acos(
        radius / (centre - tip)
    )  # at the disc's centre, from the tip to where its sides touch
    disc = _arc(-math.pi / 2 + tangent, 1.5 * math.pi - tangent, 41, radius) + np.array([0.0, centre])
    return np.concatenate([disc, np.array([[0.0, tip]])])


def _cross() -> Points:
    a, b = 0.34, 1.0
    return np.array(
        [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    )


def _raw(shape: str) -> Points:
    h = 0.84
    polygons = {
        "square": [(-h, -h), (h, -h), (h, h), (-h, h)],
        "triangle": [(0.0, -1.1), (1.05, 0.75), (-1.05, 0.75)],
        "diamond": [(0.0, -1.2), (0.78, 0.0), (0.0, 1.2), (-0.78, 0.0)],
        "arrow": [
            (-1.0, -0.28),
            (0.05, -0.28),
            (0.05, -0.85),
            (1.1, 0.0),
            (0.05, 0.85),
            (0.05, 0.28),
            (-1.0, 0.28),
        ],
        "hourglass": [(-0.8, -1.0), (0.8, -1.0), (0.17, 0.0), (0.8, 1.0), (-0.8, 1.0), (-0.17, 0.0)],
    }
    if shape in polygons:
        return np.array(polygons[shape])
    curves = {"star": _star, "heart": _heart, "crescent": _crescent, "drop": _drop, "cross": _cross}
    if shape in curves:
        return curves[shape]()
    return _circle({"circle": 0.95, "ring": 1.0}[shape])


def _area_and_centroid(points: Points) -> tuple[float, Points]:
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    area = float(cross.sum() / 2)
    return abs(area), ((points + following) * cross[:, None]).sum(axis=0) / (6 * area)


@functools.cache
def outline(shape: str) -> Points:
    """The outer contour of `shape` as a closed polygon [n, 2] in units of the radius, centroid at (0, 0).

    Raises KeyError for a name that is no shape.
    """
    points = _raw(shape)
    return points - _area_and_centroid(points)[1]


@functools.cache
def holes(shape: str) -> tuple[Points, ...]:
    """The inner contours of `shape`, in the same units: one for the ring, none for all others."""
    return (_circle(_RING_HOLE),) if shape == "ring" else ()


@functools.cache
def area(shape: str) -> float:
    """The area inside the outer contour (holes filled), in squared radii."""
    return _area_and_centroid(outline(shape))[0]


@functools.cache
def extent(shape: str) -> float:
    """The distance from the centroid to the farthest point of the contour, in radii."""
    return float(np.linalg.norm(outline(shape), axis=1).max())


ANGULAR = frozenset({"square", "triangle", "star", "cross", "diamond", "arrow", "hourglass"})


def rounded(points: Points, amount: float) -> Points:
    """The polygon with its corners cut back by `amount` (0 to 0.25) of each edge and smoothed.

    Chaikin's corner cutting (Computer Graphics and Image Processing 3, 1974), the first cut by `amount`.
    """
    if amount <= 0:
        return points
    for ratio in (amount, 0.25, 0.25):
        following = np.roll(points, -1, axis=0)
        near, far = points + (following - points) * ratio, following + (points - following) * ratio
        points = np.stack([near, far], axis=1).reshape(-1, 2)
    return points
