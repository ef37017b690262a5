"""The picture with a hole to be filled, as the ControlNets for inpainting take it: -1 in the hole.

The convention is that of control_v11p_sd15_inpaint: the picture is in [0, 1], and all three channels are -1
where its mask is above one half. Here the hole is a fourth channel, until `conditions.values` puts the -1 in.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tuner.data import holes
from tuner.data.conditions._seam import Draw, Kind, Picture

Share = Annotated[float, Field(ge=0, le=1)]


class Config(Kind):
    """What the holes are like."""

    boxes: Share = Field(0.5, description="share of samples with boxes, 0 to 1; the others have strokes")
    everything: Share = Field(0.0, description="share of samples of which nothing is shown, 0 to 1")

    def unused(self) -> dict[str, str]:
        return {"boxes": "everything is 1"} if self.everything == 1 else {}


def make(picture: Picture, config: Config, draw: Draw) -> Picture:
    """uint8 RGB [H, W, 3] -> uint8 [H, W, 4] with a hole of brush strokes or boxes, drawn at random."""
    height, width = picture.shape[:2]
    hole = holes.some(height, width, draw.generator("hole"), config.everything, config.boxes)
    return with_hole(picture, hole)


def with_hole(picture: Picture, hole: npt.NDArray[np.bool_]) -> Picture:
    """A picture uint8 [H, W, 3] and its hole bool [H, W] -> uint8 [H, W, 4].

    The last channel is 0 in the hole, where the picture is black, and 255 elsewhere.
    """
    shown = np.where(hole[:, :, None], np.uint8(0), picture)
    return np.dstack((shown, np.where(hole, np.uint8(0), np.uint8(255))))
