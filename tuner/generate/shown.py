"""The pictures that a drawing starts from or is steered by, all of one size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tuner.data import pictures
from tuner.errors import UserError
from tuner.progress import say

Size = tuple[int, int]
MODES = {1: "L", 3: "RGB"}  # a ControlNet's conditioning_channels -> how Pillow calls such pictures


class Shown(NamedTuple):
    """Pictures beside the prompt.

    Attributes:
        size: width and height of what is drawn, in pixels.
        image: [1, 3, H, W] in [0, 1], what is started from.
        mask: [1, 1, H, W], 1 where it is drawn anew, else 0.
        conditions: for each ControlNet [1, k, H, W] in [0, 1].
    """

    size: Size
    image: Tensor | None = None
    mask: Tensor | None = None
    conditions: tuple[Tensor, ...] = ()


def choose_size(asked: str | None, image: Path | None, usual: Size, factor: int) -> Size:
    """Width and height of what is drawn.

    Args:
        asked: WxH.
        image: the picture that is started from; its size, cut to whole latent cells, where nothing is asked.
        usual: where there is no picture either.
        factor: pixels a latent cell covers.

    Raises:
        UserError: the size is none, or does not divide into latent cells.
    """
    if asked is None:
        if image is None:
            return usual
        width, height = (max(factor, side // factor * factor) for side in pictures.size(image))
        return width, height
    match = re.fullmatch(r"(\d+)[xX](\d+)", asked.strip())
    if match is None:
        raise UserError(f"--size {asked}: expected WIDTHxHEIGHT in pixels, as 768x512")
    width, height = int(match[1]), int(match[2])
    near = [max(factor, round(side / factor) * factor) for side in (width, height)]
    if [width, height] != near:
        raise UserError(f"--size {asked}: expected multiples of {factor}; the nearest is {near[0]}x{near[1]}")
    return width, height


def load(size: Size, image: Path | None, mask: Path | None, conditions: Sequence[tuple[Path, int]]) -> Shown:
    """Read the pictures; those of another size are resized, and it is said.

    Args:
        conditions: for each ControlNet its picture, and how many channels it looks at.

    Raises:
        UserError: one is no picture, or a ControlNet looks at another number of channels than 1 or 3; the
            mask is all black.
    """
    hole = None
    if mask is not None:
        hole = (_read(mask, size, "L", Image.Resampling.BILINEAR) >= 0.5).float()
        if not bool(hole.any()):
            raise UserError(f"--mask {mask.name}: it is all black, so nothing would be drawn")
    looks = []
    for path, channels in conditions:
        if channels not in MODES:
            raise UserError(
                f"--controlnet: the one of {path.name} looks at {channels} channels, expected 1 or 3"
            )
        looks.append(_read(path, size, MODES[channels], Image.Resampling.LANCZOS))
    start = None if image is None else _read(image, size, "RGB", Image.Resampling.LANCZOS)
    return Shown(size, start, hole, tuple(looks))


def _read(path: Path, size: Size, mode: str, how: Image.Resampling) -> Tensor:
    """[1, k, H, W] in [0, 1]."""
    picture = Image.fromarray(pictures.load(path)).convert(mode)
    if picture.size != size:
        (width, height), (wide, high) = picture.size, size
        shape = "" if width * high == height * wide else ", which changes its proportions"
        say(f"{path.name}: {width}x{height} pixels, resized to {wide}x{high}{shape}")
        picture = picture.resize(size, how)
    values = np.asarray(picture)
    return torch.from_numpy(pictures.to_unit(values.reshape(*values.shape[:2], -1))).unsqueeze(0)
