"""The picture without its colours."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tuner.data.conditions._seam import Draw, Kind, Picture, three


class Config(Kind):
    """There is nothing to choose."""


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> uint8 [H, W, 3], all channels 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)."""
    return three(np.asarray(Image.fromarray(picture).convert("L")))
