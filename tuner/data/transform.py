"""The one geometric transform that a picture, its condition and its mask share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from tuner.errors import UserError

Picture = npt.NDArray[np.uint8]
Filter = Literal["lanczos", "area", "nearest"]

_FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "area": Image.Resampling.BOX,
    "nearest": Image.Resampling.NEAREST,
}

MOST = 64
"""A picture that would have more than this many times the target's pixels before the crop (its aspect is that
far from the target's) is resized only where it is seen, as the whole could fill the memory."""


@dataclass(frozen=True)
class Transform:
    """Resize until the target is just covered, crop the target out of that, mirror.

    Attributes:
        height, width: the target's, in pixels.
        across, down: where the crop lies, 0..1 of the room there is; 0.5 is the centre.
        flip: mirrored left to right, after the crop.
    """

    height: int
    width: int
    across: float = 0.5
    down: float = 0.5
    flip: bool = False

    def scale(self, height: int, width: int) -> float:
        """How much a picture of [H, W] is enlarged, as a factor of its sides; below 1 it is made smaller."""
        return max(self.height / height, self.width / width)

    def place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Where a picture of [H, W] is cropped, before it is mirrored.

        Returns:
            Its height and width after resizing, and the crop's top and left in that.
        """
        scale = self.scale(height, width)
        height, width = max(self.height, round(height * scale)), max(self.width, round(width * scale))
        top, left = round((height - self.height) * self.down), round((width - self.width) * self.across)
        return height, width, top, left

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the crop as the mirrored picture shows it, from the picture's [H, W]."""
        _, wide, top, left = self.place(height, width)
        return top, wide - self.width - left if self.flip else left

    def told(self, height: int, width: int) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told of a picture of [H, W] (arXiv:2307.01952, section 2.2), in pixels.

        Returns:
            The picture's own height and width, top and left of the crop in the resized picture as the
            mirrored one shows it, the target's height and width.
        """
        return height, width, *self.seen(height, width), self.height, self.width

    def crop_loss(self, height: int, width: int) -> float:
        """The share of a picture of [H, W] that the crop cuts away, in [0, 1)."""
        high, wide, _, _ = self.place(height, width)
        return 1 - self.height * self.width / (high * wide)

    def __call__(
        self, picture: Picture, by: Filter = "lanczos", of: tuple[int, int] | None = None
    ) -> Picture:
        """The part of a picture that is trained on.

        Args:
            picture: uint8 [H, W, 3], or [H, W] for a mask.
            by: how it is resized: `lanczos` (antialiased) for what is looked at, `area` (the mean of what a
                pixel covers) for soft masks, `nearest` for masks and maps whose values must not mix.
            of: height and width of the picture that this one belongs to, where it is a condition or a mask:
                it is brought to that one's size after resizing, and cropped at the same place.

        Returns:
            uint8 [height, width, 3] or [height, width].
        """
        assert picture.ndim in (2, 3) and picture.dtype == np.uint8
        # The place of the picture itself, also where the condition has another size.
        place = high, wide, top, left = self.place(*(of or picture.shape[:2]))
        if high * wide > MOST * self.height * self.width:
            cropped = self._near(picture, by, place)
        else:
            if picture.shape[:2] != (high, wide):
                picture = np.asarray(Image.fromarray(picture).resize((wide, high), _FILTERS[by]))
            cropped = picture[top : top + self.height, left : left + self.width]
        return np.ascontiguousarray(cropped[:, ::-1] if self.flip else cropped)

    def _near(self, picture: Picture, by: Filter, place: tuple[int, int, int, int]) -> Picture:
        """The crop of place(), without the whole resized picture; equal to it but for rounding."""
        high, wide, top, left = place
        rows, columns = picture.shape[:2]
        box = (
            left * columns / wide,
            top * rows / high,
            min(columns, (left + self.width) * columns / wide),
            min(rows, (top + self.height) * rows / high),
        )
        return np.asarray(Image.fromarray(picture).resize((self.width, self.height), _FILTERS[by], box))


def check_fits(name: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    """Whether a condition or a mask has its picture's shape; its size may be another.

    Args:
        name: of the condition or mask, for the message.
        found, expected: its height and width, and the picture's.

    Raises:
        UserError: they differ by more than the rounding of a pixel.
    """
    (height, width), (high, wide) = found, expected
    if abs(wide * height - width * high) > max(wide, high, width, height):
        raise UserError(f"{name}: {width}x{height} pixels do not fit the picture's {wide}x{high}")
