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


def draw(size: int, seed: int, epoch: int, position: int) -> npt.NDArray[np.float32]:
    """A hole float32 [1, size, size], 1 where the picture is to be filled, else 0; never empty."""
    drawn = counted.generator(seed, epoch, position, purpose="mask")
    kind = drawn.random()
    if kind < EVERYTHING:
        return np.ones((1, size, size), np.float32)
    picture = Image.new("1", (size, size))
    pen = ImageDraw.Draw(picture)
    if kind < EVERYTHING + BOXES * (1 - EVERYTHING):
        _boxes(pen, size, drawn)
    else:
        _strokes(pen, size, drawn)
    return np.asarray(picture, dtype=np.float32)[None]


def _boxes(pen: ImageDraw.ImageDraw, size: int, drawn: np.random.Generator) -> None:
    """One to three boxes with sides of an eighth to three quarters of the picture's."""
    for _ in range(1 + int(3 * drawn.random())):
        wide, high = ((0.125 + 0.625 * share) * size for share in drawn.random(2))
        left, top = drawn.random(2) * (size - wide, size - high)
        pen.rectangle((left, top, left + wide, top + high), fill=1)


def _strokes(pen: ImageDraw.ImageDraw, size: int, drawn: np.random.Generator) -> None:
    """One to four strokes of a round brush, each of up to eight straight pieces, within the picture."""
    for _ in range(1 + int(4 * drawn.random())):
        brush = (0.05 + 0.15 * drawn.random()) * size
        x, y = drawn.random(2) * size
        for _ in range(1 + int(8 * drawn.random())):
            turn, length = 2 * math.pi * drawn.random(), (0.05 + 0.25 * drawn.random()) * size
            end = (x + length * math.cos(turn), y + length * math.sin(turn))
            to_x, to_y = (min(max(value, 0.0), float(size)) for value in end)
            pen.line((x, y, to_x, to_y), fill=1, width=max(1, round(brush)))
            for at_x, at_y in ((x, y), (to_x, to_y)):
                half = brush / 2
                pen.ellipse((at_x - half, at_y - half, at_x + half, at_y + half), fill=1)
            x, y = to_x, to_y
