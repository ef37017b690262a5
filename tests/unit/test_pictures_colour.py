"""Pictures are turned as their EXIF says, and their colour profiles become sRGB."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageCms, ImageOps

from tuner.data.pictures import decode, facts

Array = npt.NDArray[Any]
COLOURS = np.array(
    [[[250, 20, 40], [10, 240, 90]], [[128, 60, 200], [0, 0, 0]], [[255, 255, 255], [7, 90, 5]]]
)
SHOWN = np.kron(COLOURS, np.ones((16, 16, 1))).astype(np.uint8)  # [48, 32, 3], of blocks for lossy formats
FORMATS: dict[str, tuple[dict[str, Any], int]] = {  # how it is saved, within how many levels
    "PNG": ({}, 0),
    "TIFF": ({}, 0),
    "WEBP": ({"lossless": True}, 0),
    "JPEG": ({"quality": 100, "subsampling": 0}, 4),
    "AVIF": ({"quality": 100, "subsampling": "4:4:4"}, 4),
}
# EXIF 2.3, Orientation: the sides of the shown picture at which row 0 and column 0 of the stored one lie.
SIDES = {
    **{1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left")},
    **{5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom")},
}


def stored(shown: Array, orientation: int) -> Array:
    """How a picture is stored so that it is shown like this, by the words of the standard."""
    row, column = SIDES[orientation]
    if row in ("left", "right"):
        shown = shown.swapaxes(0, 1)
    return np.ascontiguousarray(
        shown[:: 1 if row in ("top", "left") else -1, :: 1 if column in ("top", "left") else -1]
    )


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def saved(array: Array, kind: str, **more: Any) -> bytes:
    stream = BytesIO()
    Image.fromarray(array).save(stream, kind, **more)
    return stream.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_orientation_is_turned_upright(kind: str) -> None:
    options, within = FORMATS[kind]
    shapes = []
    for orientation in SIDES:
        data = saved(stored(SHOWN, orientation), kind, exif=exif(orientation), **options)
        picture, _, notes = decode(data, "a")
        assert picture.shape == SHOWN.shape and not notes and picture.flags["C_CONTIGUOUS"]
        assert np.abs(picture.astype(int) - SHOWN).max() <= within, orientation
        theirs = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
        assert np.array_equal(picture, theirs)
        found = facts(data, "a")
        assert (found.width, found.height) == (32, 48)
        shapes.append(stored(SHOWN, orientation).shape[:2])
    assert len(SIDES) == 8 and shapes == [(48, 32)] * 4 + [(32, 48)] * 4 and len(FORMATS) == 5


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_exif_behind_the_pixels_and_in_xmp_turns_too() -> None:
    plain = saved(stored(SHOWN, 6), "PNG")
    late = plain[:-12] + chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0")) + plain[-12:]
    words = b'<rdf:Description tiff:Orientation="6"/>'
    xmp = plain[:33] + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + words) + plain[33:]
    seen = 0
    for data in (late, xmp, saved(stored(SHOWN, 6), "JPEG", quality=100, subsampling=0, xmp=words)):
        found = facts(data, "a")
        assert (found.width, found.height) == (32, 48)
        assert np.abs(decode(data, "a").picture.astype(int) - SHOWN).max() <= 4
        seen += 1
    assert seen == 3 and decode(plain, "a").picture.shape == (32, 48, 3)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int) -> None:
    data = saved(SHOWN, "PNG", exif=exif(value))
    assert np.array_equal(decode(data, "a").picture, SHOWN) and facts(data, "a").width == 32


def test_damaged_exif_is_told_and_turns_nothing() -> None:
    data = saved(SHOWN, "PNG", exif=b"Exif\0\0not a TIFF header")
    picture, _, notes = decode(data, "a")
    assert np.array_equal(picture, SHOWN) and notes == ("its EXIF data is damaged: not turned",)


PRIMARIES = {  # of sRGB as D50 (ICC): X, Y, Z
    "r": (0.4360747, 0.2225045, 0.0139322),
    "g": (0.3850649, 0.7168786, 0.0971045),
    "b": (0.1430804, 0.0606169, 0.7141733),
}
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space: bytes, tags: dict[bytes, bytes], between: bytes = b"XYZ ") -> bytes:
    """An ICC profile (ISO 15076-1) from its tags.

    The one for CMYK is of version 2: between two of version 4 the blacks would be fitted to one another.
    """
    text = "made here".encode("utf-16-be")
    words = b"mluc" + struct.pack(">5I", 0, 1, 12, 0x656E5553, len(text)) + struct.pack(">I", 28) + text
    tags = {b"desc": words, b"cprt": words, b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)} | tags
    at, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data.ljust(-(-len(data) // 4) * 4, b"\0")
    device = b"prtr" if space == b"CMYK" else b"mntr"
    day = struct.pack(">6H", 2024, 1, 1, 0, 0, 0)
    version = 0x02100000 if space == b"CMYK" else 0x04300000
    head = struct.pack(">I4xI", at + len(body), version) + device + space + between + day + b"acsp"
    head = head.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def curve(*values: float) -> bytes:
    """A parametric curve: of one value (a power) or five (sRGB's)."""
    return b"para\0\0\0\0" + struct.pack(">HH", {1: 0, 5: 3}[len(values)], 0) + fixed(*values)


def matrix(order: str, *values: float) -> bytes:
    """An RGB profile with sRGB's primaries in an order, and one curve."""
    tags = {
        f"{channel}XYZ".encode(): b"XYZ \0\0\0\0" + fixed(*PRIMARIES[place])
        for channel, place in zip("rgb", order, strict=True)
    }
    return profile(b"RGB ", tags | {f"{channel}TRC".encode(): curve(*values) for channel in "rgb"})


def from_linear(light: Array) -> Array:
    """Light 0..1 to sRGB's levels 0..255 (IEC 61966-2-1)."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055) * 255


def black_only() -> bytes:
    """A CMYK profile that sees only the black ink: L* = 100 (1 - K), no colour (a table of 8 bits)."""
    same = bytes(range(256))
    corners = [bytes([0 if corner % 2 else 255, 128, 128]) for corner in range(16)]  # K runs fastest
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += same * 4 + b"".join(corners) + same * 3
    return profile(b"CMYK", {b"A2B0": table}, b"Lab ")


ALL_LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
NOISE = np.random.default_rng(3).integers(0, 256, (16, 16, 3)).astype(np.uint8)
TOLD = "colours converted to sRGB from the profile made here"


def converted() -> Iterator[tuple[str, bytes, Array]]:
    """Pictures with a profile, and what they are in sRGB by the formulas."""
    yield (
        "red and green change places",
        saved(NOISE, "PNG", icc_profile=matrix("grb", *SRGB_CURVE)),
        NOISE[:, :, [1, 0, 2]],
    )
    yield "linear light", saved(NOISE, "PNG", icc_profile=matrix("rgb", 1.0)), from_linear(NOISE / 255)
    yield "gamma 1.8", saved(NOISE, "PNG", icc_profile=matrix("rgb", 1.8)), from_linear((NOISE / 255) ** 1.8)
    linear = profile(b"GRAY", {b"kTRC": curve(1.0)})
    greys = np.repeat(from_linear(ALL_LEVELS / 255)[:, :, None], 3, axis=2)
    yield "gray in linear light", saved(ALL_LEVELS, "PNG", icc_profile=linear), greys
    yield "gray with a profile for RGB", saved(ALL_LEVELS, "PNG", icc_profile=matrix("rgb", 1.0)), greys
    inks = np.dstack([NOISE, ALL_LEVELS])
    light = np.repeat((100 * (1 - ALL_LEVELS / 255))[:, :, None], 3, axis=2)  # L*
    shares = np.where(light > 8, ((light + 16) / 116) ** 3, light * 27 / 24389)  # CIE 15: L* to Y
    stream = BytesIO()
    Image.fromarray(inks, "CMYK").save(stream, "TIFF", icc_profile=black_only())
    yield "CMYK by its black ink", stream.getvalue(), from_linear(shares)


def test_colours_of_a_profile_become_srgb_as_its_formulas_say() -> None:
    seen = []
    for what, data, expected in converted():
        picture, _, notes = decode(data, "a")
        assert notes == (TOLD,), what
        off = np.abs(picture - expected)
        # The tables of 8 bits inside the CMS are coarse where sRGB's curve is steep, in the darkest levels.
        assert off[expected > 60].max() <= 2 and off.max() <= 10 and off.mean() < 0.6, (what, off.max())
        seen.append(what)
    assert len(seen) == 6


def test_a_picture_in_srgb_is_not_touched() -> None:
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    seen = 0
    for icc in (built_in, matrix("rgb", *SRGB_CURVE)):
        picture, _, notes = decode(saved(NOISE, "PNG", icc_profile=icc), "a")
        assert np.array_equal(picture, NOISE) and not notes
        seen += 1
    assert seen == 2


@pytest.mark.parametrize(
    ("icc", "note"),
    [
        (b"no profile at all", r"its colour profile is damaged \(.*\): not used"),
        (matrix("grb", *SRGB_CURVE)[:200], r"its colour profile is damaged \(.*\): not used"),
        (black_only(), "its colour profile is for CMYK, the picture is RGB: not used"),
        (
            profile(b"GRAY", {b"kTRC": curve(1.0)}),
            "its colour profile is for GRAY, the picture is RGB: not used",
        ),
    ],
)
def test_a_profile_that_cannot_be_used_is_told(icc: bytes, note: str) -> None:
    picture, _, notes = decode(saved(NOISE, "PNG", icc_profile=icc), "a")
    assert np.array_equal(picture, NOISE) and len(notes) == 1
    assert re.fullmatch(note, notes[0])


def test_lab_and_cmyk_with_a_foreign_profile() -> None:
    inks = np.dstack([NOISE, ALL_LEVELS])
    stream = BytesIO()
    Image.fromarray(inks, "CMYK").save(stream, "TIFF", icc_profile=matrix("rgb", 1.0))
    picture, _, (note,) = decode(stream.getvalue(), "a")
    expected = (1 - NOISE / 255) * (1 - ALL_LEVELS[:, :, None] / 255) * 255
    assert np.abs(picture - expected).max() <= 1
    assert note.startswith("its colour profile is for RGB, the picture is CMYK: not used; CMYK without")
    lab = np.zeros((2, 2, 3), np.uint8)
    lab[0, 0, 0], lab[1, 1, 0] = 255, 136  # white; L* 53.3 is the middle gray 127
    stream = BytesIO()
    Image.fromarray(lab, "LAB").save(stream, "TIFF")
    picture, _, notes = decode(stream.getvalue(), "a")
    assert notes == ("Lab colours converted to sRGB",)
    assert np.abs(picture[:, :, 0].astype(int) - [[255, 0], [0, 127]]).max() <= 1
    assert np.ptp(picture.astype(int), axis=2).max() <= 1
