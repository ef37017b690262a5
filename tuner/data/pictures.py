"""Pictures from bytes as RGB of 8 bits.

The content decides what a file is, never its name. What is changed on the way is told in notes; what cannot
be read is one UserError that names the picture and the reason. Not readable, because their values have no
agreed range: 32-bit integers and floating point. Not seen, because the formats carry no check sum: damage
inside the data of a JPEG or WebP that its decoder bridges. Not applied: HDR curves (AVIF, PNG's cICP).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from tuner.data import colour, deep, unreadable
from tuner.data.deep import Parts
from tuner.data.turn import orientation, turned
from tuner.errors import UserError

Picture = npt.NDArray[np.uint8]

SUFFIXES = {  # a format that is read, as Pillow calls it: endings of its files
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}

LIMIT = 2**28
"""Pixels of a picture that are allowed where nothing else is said: 16384 x 16384, 0.8 GB as RGB."""

LIMIT_KEY = "data.max_pixels"
"""Where a recipe sets the limit, for messages."""

# Pillow's own limit cannot be set for one picture. Ours, checked from each header before decoding, stands in.
Image.MAX_IMAGE_PIXELS = None

TIFF_BITS = 258  # the tag BitsPerSample


@dataclass(frozen=True)
class Reading:
    """How pictures are read.

    Attributes:
        background: red, green, blue, 0..255, on which transparent parts are composited.
        alpha: "composite" lays the picture on the background; "mask" keeps its colours as they are stored and
            gives its alpha as a mask (the background then has no use).
        limit: pixels, width times height, above which a picture is refused from its header.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    alpha: Literal["composite", "mask"] = "composite"
    limit: int = LIMIT


class Decoded(NamedTuple):
    """A picture uint8 RGB [H, W, 3] in sRGB, its alpha uint8 [H, W] where asked for and there, and notes.

    The arrays can be read-only. A note says in words what was changed, without the picture's name.
    """

    picture: Picture
    mask: Picture | None
    notes: tuple[str, ...]


class Facts(NamedTuple):
    """What a header says.

    Attributes:
        width, height: pixels as shown, so turned as EXIF says.
        mode: as Pillow calls it, with ";16" added where it hides that a channel has 16 bits.
        frames: or pages.
        alpha: there is transparency, though every pixel may be opaque.
    """

    width: int
    height: int
    mode: str
    frames: int
    alpha: bool


def decode(data: bytes, name: str, rules: Reading | None = None) -> Decoded:
    """A picture from the bytes of a file.

    16 bits are rounded to 8 (value / 257); colours with an ICC profile become sRGB; of several frames or
    pages the first is taken; transparency is composited: (colour alpha + background (255 - alpha)) / 255,
    rounded. A CMYK JPEG is read as inverted, which Adobe began and all follow.

    Args:
        name: for messages; where it ends in a known suffix, that is compared with the content.

    Raises:
        UserError: no picture, damaged, of a kind that is not read, or above the limit.
    """
    rules = rules or Reading()
    with _opened(BytesIO(data), name, rules.limit) as image:
        turn, bits = orientation(image), _bits(image)
        seen, notes = _facts(image, turn), _remarks(image, name)
        if turn == 0:
            notes.append("its EXIF data is damaged: not turned")
        if image.format == "PNG":
            _check_sums(data)
        image.load()
        turn = 1 if image.format == "TIFF" else turn  # Pillow has turned a TIFF
        plain, alpha = _parts(image, data, bits, notes)
        profile = image.info.get("icc_profile") if image.mode != "LAB" else None
        shown, note = colour.to_srgb(plain, profile)
        notes += [note] if note else []
        mask = None
        if alpha is not None:
            least, most = alpha.getextrema()
            if most == 0:
                notes.append("every pixel is fully transparent")
            if rules.alpha == "mask":
                mask = turned(np.asarray(alpha), turn)
            elif least != 255:
                notes.append(f"transparent parts lie on the colour {rules.background}")
                shown = Image.composite(shown, Image.new("RGB", shown.size, rules.background), alpha)
        picture = turned(np.asarray(shown), turn)
        assert picture.shape == (seen.height, seen.width, 3), (picture.shape, seen)
        return Decoded(picture, mask, tuple(notes))


def facts(source: bytes | IO[bytes], name: str, rules: Reading | None = None) -> Facts:
    """What the header of a picture says, without decoding it.

    Args:
        source: a picture's bytes, or an open file, of which only what is needed is read.

    Raises:
        UserError: as `decode` does, as far as the header shows it.
    """
    stream = BytesIO(source) if isinstance(source, bytes) else source
    with _opened(stream, name, (rules or Reading()).limit) as image:
        return _facts(image, orientation(image))


def load(path: Path) -> Picture:
    """A file's picture as uint8 RGB [H, W, 3], turned as its EXIF says; transparency lies on white.

    Raises:
        UserError: the file is not there, is no picture, or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(str(path), error.strerror or str(error)) from error
    return decode(data, str(path)).picture


def size(path: Path) -> tuple[int, int]:
    """Width and height of a file's picture, turned as its EXIF says, from its header.

    Raises:
        UserError: the file is not there, or is no picture.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise _unreadable(str(path), error.strerror or str(error)) from error
    with stream:
        found = facts(stream, str(path))
    return found.width, found.height


def to_unit(picture: Picture) -> npt.NDArray[np.float32]:
    """uint8 [H, W, C] -> float32 [C, H, W] in [0, 1]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)


def to_signed(picture: Picture) -> npt.NDArray[np.float32]:
    """uint8 [H, W, C] -> float32 [C, H, W] in [-1, 1]."""
    return to_unit(picture) * np.float32(2) - np.float32(1)


def _unreadable(name: str, reason: str) -> UserError:
    return UserError(f"{name}: this picture cannot be read: {reason}")


@contextmanager
def _opened(stream: IO[bytes], name: str, limit: int) -> Iterator[ImageFile.ImageFile]:
    """The header of a picture within the limit; whatever goes wrong inside is the one UserError."""
    # Another library may have set it, and half a picture must not pass.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(stream, formats=tuple(SUFFIXES))
    except unreadable.DAMAGE as error:
        stream.seek(0)
        reason = unreadable.what(stream.read(4096), tuple(SUFFIXES))
        words = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise _unreadable(name, reason + words) from error
    try:
        with image:
            width, height = image.size
            if width * height > limit:
                raise _unreadable(
                    name,
                    f"{width} x {height} pixels are more than the {limit} allowed; "
                    f"{LIMIT_KEY} sets this limit (is it a decompression bomb?)",
                )
            if image.mode in ("I", "F"):
                kind = "32-bit or signed integers" if image.mode == "I" else "floating point numbers"
                words = (
                    f"its values are {kind}, which have no agreed range; save it with 8 or 16 bits a channel"
                )
                raise _unreadable(name, words)
            yield image
    except UserError:
        raise
    except MemoryError as error:
        raise _unreadable(name, "there is not enough memory to decode it") from error
    except unreadable.DAMAGE as error:
        # The message of a KeyError and the like says nothing without its name.
        words = str(error) if isinstance(error, OSError | SyntaxError) else f"{type(error).__name__}: {error}"
        raise _unreadable(name, f"it is cut off or damaged ({words})") from error


def _facts(image: ImageFile.ImageFile, turn: int) -> Facts:
    width, height = image.size
    # Pillow gives a TIFF's size as turned by its own tag already, though not by its XMP.
    done = isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.Orientation, 1) >= 5
    if (turn >= 5) != done:
        width, height = height, width
    hidden = ";16" if _bits(image) == 16 and not image.mode.startswith("I;16") else ""
    return Facts(
        width, height, image.mode + hidden, getattr(image, "n_frames", 1), image.has_transparency_data
    )


def _remarks(image: ImageFile.ImageFile, name: str) -> list[str]:
    """What the header gives reason to tell."""
    notes, kind = [], "JPEG" if image.format == "MPO" else str(image.format)
    suffix = PurePosixPath(name).suffix.lower()
    if any(suffix in known for known in SUFFIXES.values()) and suffix not in SUFFIXES[kind]:
        notes.append(f"its name ends in {suffix}, its content is {kind}")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"{frames} frames or pages; the first is used")
    gamma = image.info.get("gamma")
    if gamma and abs(gamma * 2.2 - 1) > 0.02 and not {"icc_profile", "srgb"} & image.info.keys():
        notes.append(f"its gamma of {gamma:g} is not used")
    return notes


def _bits(image: ImageFile.ImageFile) -> int:
    """Bits of a channel as the file stores it, where that can be more than 8."""
    if isinstance(image, TiffImageFile):
        return int(max(image.tag_v2.get(TIFF_BITS, (1,))))
    if image.format == "PNG":
        assert image.fp is not None
        before = image.fp.tell()
        image.fp.seek(24)  # in the header chunk, which comes first
        (depth,) = image.fp.read(1)
        image.fp.seek(before)
        return depth
    return 8


def _check_sums(data: bytes) -> None:
    """Every chunk of a PNG against its check sum, which decoding alone does not compare."""
    with Image.open(BytesIO(data), formats=("PNG",)) as again:
        again.verify()


def _parts(image: ImageFile.ImageFile, data: bytes, bits: int, notes: list[str]) -> Parts:
    """A decoded picture's colours with 8 bits (L, RGB or CMYK), and its alpha (L) if it has one."""
    if bits > 8:
        parts, note = deep.parts(image, data, bits)
        notes.append(note)
        if parts is not None:
            return parts
    if image.mode == "LAB":
        notes.append("Lab colours converted to sRGB")
    see_through = image.info.get("transparency")
    if image.mode in ("1", "L") and see_through is not None:
        # The one value that is transparent, as stored; Pillow compares it with values made 0..255.
        level = 255 * bool(see_through) if bits == 1 else see_through * 255 // (2**bits - 1)
        gray = image.convert("L")
        return gray, deep.opaque(np.asarray(gray) != level)
    if image.has_transparency_data:
        bands = "LA" if image.mode in ("LA", "La") else "RGBA"
        whole = image.convert(bands)
        return whole.convert(bands[:-1]), whole.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None
