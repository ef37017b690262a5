"""Which way up a picture is stored, from its header, and turning it as it is to be shown."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile

from tuner.data.unreadable import DAMAGE

TURNS = (  # by EXIF's orientation: is the picture transposed, and are then its rows, its columns reversed
    (False, False, False),  # 0: damaged
    (False, False, False),
    (False, False, True),
    (False, True, True),
    (False, True, False),
    (True, False, False),
    (True, False, True),
    (True, True, True),
    (True, True, False),
)


def orientation(image: ImageFile.ImageFile) -> int:
    """EXIF's orientation 1..8 from the header; 1 where there is none, 0 where it is damaged.

    To be asked once: asked again, Pillow says of damaged EXIF that there is none.
    """
    try:
        if image.format == "PNG":
            # The PNG class's own getexif would decode the picture to look behind its pixels.
            exif = Image.Image.getexif(image)
            late = None if "exif" in image.info else _late_exif(image)
            if late is not None:
                exif.load(late)
        else:
            exif = image.getexif()
        found = exif.get(ExifTags.Base.Orientation, 1)
    except DAMAGE:  # common beside a whole picture: said, but no reason to refuse it
        return 0
    return found if found in range(1, len(TURNS)) else 1


def turned(picture: npt.NDArray[np.uint8], turn: int) -> npt.NDArray[np.uint8]:
    """A picture [H, W, ...] as it is to be shown, from how it is stored."""
    transposed, rows, columns = TURNS[turn]
    picture = picture.swapaxes(0, 1) if transposed else picture
    return np.ascontiguousarray(picture[:: -1 if rows else 1, :: -1 if columns else 1])


def _late_exif(image: ImageFile.ImageFile) -> bytes | None:
    """The EXIF chunk of a PNG that lies behind its pixels, as some tools write it."""
    stream = image.fp
    assert stream is not None
    before, found = stream.tell(), None
    stream.seek(8)
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"eXIf":
            found = stream.read(length)
            break
        stream.seek(length + 4, 1)
    stream.seek(before)
    return found
