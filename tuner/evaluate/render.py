"""Drawing a scene of the shapes world, anti-aliased (drawn four times larger, then averaged)."""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
import numpy.typing as npt

from tuner.evaluate import outlines
from tuner.evaluate.world import BACKGROUNDS, COLOURS, SIDE, Object, Scene, reach

Picture = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float32]

SCALE = 4  # supersampling
_SHIFT = 4  # fractional bits of the points given to OpenCV
LIGHT_END = 0.42  # share of white at the light end of a gradient
DARK_END = 0.60  # factor on the colour at its dark end


def contours(thing: Object) -> list[npt.NDArray[np.float64]]:
    """The contours of an object, outer one first, as polygons [n, 2] in pixels of the picture."""
    stretch = np.array([math.sqrt(thing.aspect), 1 / math.sqrt(thing.aspect)]) * thing.radius
    angle = math.radians(thing.rotation)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    found = []
    for unit in (outlines.outline(thing.shape), *outlines.holes(thing.shape)):
        points = outlines.rounded(unit, thing.rounding) if thing.shape in outlines.ANGULAR else unit
        found.append((points * stretch) @ turn + np.array([thing.x, thing.y]))
    return found


def _fixed(points: npt.NDArray[np.float64], origin: tuple[int, int]) -> npt.NDArray[np.int32]:
    """Pixels of the picture -> fixed-point coordinates of the enlarged window that starts at `origin`."""
    enlarged = (points - np.array(origin)) * SCALE - 0.5  # OpenCV counts from the centre of the first pixel
    return np.asarray(np.round(enlarged * (1 << _SHIFT)), np.int32)


def _lines(side: int, thing: Object) -> Picture:
    """Parallel lines through a window of side x side enlarged pixels."""
    yy, xx = np.mgrid[0:side, 0:side].astype(np.float32) - (side - 1) / 2
    angle = math.radians(thing.texture)
    across = (xx * math.sin(angle) - yy * math.cos(angle)) / SCALE
    off = np.abs((across + thing.spacing / 2) % thing.spacing - thing.spacing / 2)  # from the nearest line
    return np.asarray(off < thing.line / 2, np.uint8)


def _dots(side: int, thing: Object) -> Picture:
    """A square grid of dots in a window of side x side enlarged pixels."""
    yy, xx = np.mgrid[0:side, 0:side].astype(np.float32) - (side - 1) / 2
    angle, step = math.radians(thing.texture / 3), thing.spacing * 1.15
    u = (xx * math.cos(angle) + yy * math.sin(angle)) / SCALE
    v = (yy * math.cos(angle) - xx * math.sin(angle)) / SCALE
    du, dv = (w - step * np.round(w / step) for w in (u, v))
    return np.asarray(du * du + dv * dv < (thing.line * 1.05) ** 2, np.uint8)


def _cover(thing: Object, style: str, origin: tuple[int, int], side: int) -> Array:
    """The share of each pixel of a window of side x side pixels that the object's colour covers."""
    polygons = [_fixed(points, origin) for points in contours(thing)]
    big = np.zeros((side * SCALE, side * SCALE), np.uint8)
    if style != "outlined":
        cv2.fillPoly(big, polygons, 1, lineType=cv2.LINE_8, shift=_SHIFT)
    if style == "hatched":
        big &= _lines(side * SCALE, thing)
    elif style == "dotted":
        big &= _dots(side * SCALE, thing)
    if style in ("outlined", "hatched", "dotted"):
        width = thing.stroke * {"outlined": 1.15, "hatched": 0.8, "dotted": 0.7}[style]
        cv2.polylines(big, polygons, True, 1, max(1, round(width * SCALE)), cv2.LINE_8, _SHIFT)
    small = cv2.resize(big * np.uint8(240), (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32) / np.float32(240)


def _paint(thing: Object, style: str, origin: tuple[int, int], side: int) -> Array:
    """The object's colour over the window: [1, 1, 3], or [side, side, 3] for a gradient."""
    colour = np.asarray(np.clip(np.array(COLOURS[thing.colour]) * thing.tint, 0, 255), np.float32)
    if style != "gradient":
        return np.asarray(colour.reshape(1, 1, 3), np.float32)
    yy, xx = np.mgrid[0:side, 0:side].astype(np.float32) + 0.5
    angle = math.radians(thing.light)
    along = (xx + origin[0] - thing.x) * math.cos(angle) + (yy + origin[1] - thing.y) * math.sin(angle)
    t = np.clip(along / thing.radius * 0.5 + 0.5, 0, 1)[..., None]
    light, dark = colour + (255 - colour) * LIGHT_END, colour * DARK_END
    return np.asarray(light * (1 - t) + dark * t, np.float32)


@functools.cache
def _grid() -> tuple[Array, Array, Array]:
    yy, xx = (np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) + 0.5) / (SIDE / 2) - 1
    return xx, yy, (xx * xx + yy * yy) / 2


def _ground(scene: Scene) -> Array:
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    if scene.vignette or scene.shade:
        xx, yy, from_centre = _grid()
        angle = math.radians(scene.shade_angle)
        side = xx * math.cos(angle) + yy * math.sin(angle)
        picture *= (1 - scene.vignette * from_centre + scene.shade * side / 2)[..., None]
    return picture


def render(scene: Scene) -> Picture:
    """The picture of a scene: uint8 [128, 128, 3], RGB."""
    picture = _ground(scene)
    for thing in scene.objects:
        half = math.ceil(reach(thing)) + 2
        x, y = math.floor(thing.x) - half, math.floor(thing.y) - half
        side = 2 * half + 1
        cover = _cover(thing, scene.style, (x, y), side)[..., None]
        paint = _paint(thing, scene.style, (x, y), side)
        rows, columns = slice(max(0, y), min(SIDE, y + side)), slice(max(0, x), min(SIDE, x + side))
        inside = (slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x))
        cover = cover[inside]
        if paint.shape[0] > 1:
            paint = paint[inside]
        window = picture[rows, columns]
        window += cover * (paint - window)
    return np.asarray(np.clip(picture + 0.5, 0, 255), np.uint8)
