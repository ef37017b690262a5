"""Pictures from files, and the one geometric transform that a picture and its condition share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tuner.errors import UserError

Picture = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side to `size`, crop a square of `size`, mirror.

    Attributes:
        size: pixels of the square.
        across, down: where the crop lies, 0..1 of the room there is; 0.5 is the centre.
        flip: mirrored left to right, after the crop.
    """

    size: int
    across: float = 0.5
    down: float = 0.5
    flip: bool = False

    def place(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Where a picture of [H, W] is cropped, before it is mirrored.

        Returns:
            Its height and width after resizing, and the crop's top and left in that.
        """
        if min(height, width) != self.size:
            scale = self.size / min(height, width)
            height, width = max(self.size, round(height * scale)), max(self.size, round(width * scale))
        top, left = round((height - self.size) * self.down), round((width - self.size) * self.across)
        return height, width, top, left

    def seen(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the crop as the mirrored picture shows it, from the picture's [H, W]."""
        _, wide, top, left = self.place(height, width)
        return top, wide - self.size - left if self.flip else left

    def __call__(self, picture: Picture) -> Picture:
        """uint8 [H, W, 3] -> uint8 [size, size, 3]; antialiased (Lanczos)."""
        height, width, top, left = self.place(*picture.shape[:2])
        if picture.shape[:2] != (height, width):
            picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
        square = picture[top : top + self.size, left : left + self.size]
        return np.ascontiguousarray(square[:, ::-1] if self.flip else square)


def load(path: Path) -> Picture:
    """A picture as uint8 RGB [H, W, 3], turned as its EXIF says; transparency lies on white.

    Raises:
        UserError: the file is no picture, or is damaged.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{path}: this picture cannot be read: {error}") from error


def size(path: Path) -> tuple[int, int]:
    """Width and height of a picture, turned as its EXIF says, from its header.

    Raises:
        UserError: the file is no picture.
    """
    try:
        with Image.open(path) as opened:
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # a quarter or three quarters
            return opened.size[::-1] if turned else opened.size
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{path}: this picture cannot be read: {error}") from error


def to_unit(picture: Picture) -> npt.NDArray[np.float32]:
    """uint8 [H, W, C] -> float32 [C, H, W] in [0, 1]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def to_signed(picture: Picture) -> npt.NDArray[np.float32]:
    """uint8 [H, W, C] -> float32 [C, H, W] in [-1, 1]."""
    return to_unit(picture) * np.float32(2) - np.float32(1)
