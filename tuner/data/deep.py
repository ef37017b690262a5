"""Pictures with more than 8 bits a channel, rounded to 8 bits; Pillow alone would clip or cut them."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

Parts = tuple[Image.Image, Image.Image | None]
"""Colours with 8 bits a channel (L, RGB or CMYK), and alpha (L) or None."""

TIFF_MEANING = 262  # the tag PhotometricInterpretation


def parts(image: ImageFile.ImageFile, data: bytes, bits: int) -> tuple[Parts | None, str]:
    """A decoded picture's parts with 8 bits, and a note of what was done.

    The parts are None where Pillow's picture, with the upper 8 bits, is as good as it gets.

    Args:
        data: the whole file.
        bits: of a channel, as the file stores it.
    """
    if image.mode.startswith("I;16"):
        return _gray(image, bits), f"{bits} bits a channel, rounded to 8"
    values = _both_bytes(image, data) if image.mode in ("RGB", "RGBA") else None
    if values is None:
        return None, f"{bits} bits a channel, the upper 8 are used"
    rounded = _to_bytes(16)[values]
    see_through = image.info.get("transparency")  # of a PNG without alpha: the one colour that is, in 16 bits
    if image.mode == "RGBA":
        alpha: Image.Image | None = Image.fromarray(np.ascontiguousarray(rounded[:, :, 3]))
    else:
        alpha = None if see_through is None else opaque((values != see_through).any(axis=2))
    colours = Image.fromarray(np.ascontiguousarray(rounded[:, :, :3]))
    return (colours, alpha), f"{bits} bits a channel, rounded to 8"


def _gray(image: ImageFile.ImageFile, bits: int) -> Parts:
    values = np.asarray(image)
    see_through = image.info.get("transparency")  # of a PNG: the one value that is
    alpha = None if see_through is None else opaque(values != see_through)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(TIFF_MEANING) == 0:  # 0 is white
        values = 2**bits - 1 - values
    return Image.fromarray(_to_bytes(bits)[values]), alpha


def _both_bytes(image: ImageFile.ImageFile, data: bytes) -> npt.NDArray[np.uint16] | None:
    """All 16 bits [H, W, C] of a picture of which Pillow keeps the upper 8.

    OpenCV reads them; None where it does not see the same picture (as with colours multiplied by alpha).
    """
    upper = np.asarray(image)
    try:
        found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    channels = upper.shape[2]
    if found is None or found.dtype != np.uint16 or found.ndim != 3 or found.shape[2] < channels:
        return None
    values = found[:, :, [2, 1, 0, 3][:channels]].astype(np.uint16)  # from blue, green, red
    return values if np.array_equal(values >> 8, upper) else None


def opaque(where: npt.NDArray[np.bool_]) -> Image.Image:
    """Alpha (L): 255 where true, else 0."""
    return Image.fromarray(where.astype(np.uint8) * np.uint8(255))


@lru_cache(maxsize=4)
def _to_bytes(bits: int) -> npt.NDArray[np.uint8]:
    """A table from values of so many bits to 0..255, rounded to the nearest."""
    top = 2**bits - 1
    table: npt.NDArray[np.uint8] = ((np.arange(top + 1) * 510 + top) // (2 * top)).astype(np.uint8)
    return table
