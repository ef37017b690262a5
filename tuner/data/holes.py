"""What an inpainting base is to fill: boxes, strokes of a brush, or everything, drawn at random."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tuner import counted

EVERYTHING = 0.25
"""Share of samples of which everything is hidden, as the model card of SD 1.5's inpainting base gives it: so
the base still draws from the prompt alone."""

BOXES = 0.5
"""Share of the others that are boxes; the rest are strokes."""


def draw(shape: tuple[int, int], seed: int, epoch: int, position: int) -> npt.NDArray[np.float32]:
    """A hole float32 [1, height, width], 1 where the picture is to be filled, else 0; never empty."""
    drawn = counted.generator(seed, epoch, position, purpose="mask")
    return some(*shape, drawn, EVERYTHING, BOXES).astype(np.float32)[None]


def some(
    height: int, width: int, drawn: np.random.Generator, everything: float, boxes: float
) -> npt.NDArray[np.bool_]:
    """A hole bool [H, W], true where the picture is hidden; never empty.

    Args:
        height, width: of the picture, in pixels.
        drawn: where the random numbers come from.
        everything: share of holes that are the whole picture.
        boxes: share of the others that are boxes; the rest are strokes.
    """
    kind = drawn.random()
    if kind < everything:
        return np.ones((height, width), np.bool_)
    picture = Image.new("1", (width, height))
    pen = ImageDraw.Draw(picture)
    if kind < everything + boxes * (1 - everything):
        _boxes(pen, height, width, drawn)
    else:
        _strokes(pen, height, width, drawn)
    return np.asarray(picture, dtype=np.bool_)


def _boxes(pen: ImageDraw.ImageDraw, height: int, width: int, drawn: np.random.Generator) -> None:
    """One to three boxes with sides of an eighth to three quarters of the picture's."""
    for _ in range(1 + int(3 * drawn.random())):
        shares = drawn.random(2)
        wide, high = (0.125 + 0.625 * shares[0]) * width, (0.125 + 0.625 * shares[1]) * height
        left, top = drawn.random(2) * (width - wide, height - high)
        pen.rectangle((left, top, left + wide, top + high), fill=1)


def _strokes(pen: ImageDraw.ImageDraw, height: int, width: int, drawn: np.random.Generator) -> None:
    """One to four strokes of a round brush, each of up to eight straight pieces, within the picture.

    Brush and pieces are measured by the shorter side.
    """
    size = min(height, width)
    for _ in range(1 + int(4 * drawn.random())):
        brush = (0.05 + 0.15 * drawn.random()) * size
        x, y = drawn.random(2) * (width, height)
        for _ in range(1 + int(8 * drawn.random())):
            turn, length = 2 * math.pi * drawn.random(), (0.05 + 0.25 * drawn.random()) * size
            end = (x + length * math.cos(turn), y + length * math.sin(turn))
            to_x, to_y = (
                min(max(value, 0.0), float(side)) for value, side in zip(end, (width, height), strict=True)
            )
            pen.line((x, y, to_x, to_y), fill=1, width=max(1, round(brush)))
            for at_x, at_y in ((x, y), (to_x, to_y)):
                half = brush / 2
                pen.ellipse((at_x - half, at_y - half, at_x + half, at_y + half), fill=1)
            x, y = to_x, to_y
