"""Every kind of picture file becomes the array that is known to lie in it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, features

from tuner.data import pictures
from tuner.data.pictures import Facts, Picture, Reading, decode, facts

Array = npt.NDArray[Any]
DRAWN = np.random.default_rng(5)
HIGH, WIDE = 5, 7
DEEP: Array = DRAWN.integers(0, 2**16, (HIGH, WIDE, 4)).astype(np.uint16)  # values of every size
DEEP[0, :3] = [[0, 127, 128, 65535], [65535, 65535, 65535, 0], [65406, 65407, 32767, 32896]]
ALL: Array = DRAWN.integers(0, 256, (HIGH, WIDE, 4)).astype(np.uint8)
RGB, GRAY, ALPHA = ALL[:, :, :3], ALL[:, :, 0], ALL[:, :, 3]
BITS = GRAY > 127
GREYS = np.kron(ALL[:2, :3, :1].repeat(3, axis=2), np.ones((16, 16, 1), np.uint8))
BLOCKS = np.kron(
    ALL[:2, :3, :3], np.ones((16, 16, 1), np.uint8)
)  # what lossy formats keep within a few levels
DEEP_NOTE = "16 bits a channel, rounded to 8"
LAID = "transparent parts lie on the colour (255, 255, 255)"
FIRST = "2 frames or pages; the first is used"


def bytes_of(values: Array) -> Array:
    """16 bits to 8 to the nearest: 65535 / 255 is 257."""
    return np.rint(values / 257).astype(np.uint8)


def on(colour: Array, alpha: Array, background: tuple[int, int, int] = (255, 255, 255)) -> Array:
    """Composited in floating point and rounded; no product of bytes lies half-way between two."""
    share = alpha[:, :, None] / 255
    return np.rint(colour * share + np.array(background) * (1 - share)).astype(np.uint8)


def grey(values: Array) -> Array:
    return np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)


def saved(array: Array, kind: str, mode: str | None = None, **more: Any) -> bytes:
    image = Image.fromarray(np.ascontiguousarray(array))
    stream = BytesIO()
    (image.convert(mode) if mode else image).save(stream, kind, **more)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: list[bytes], depth: int, kind: int, *extra: bytes, wide: int = WIDE) -> bytes:
    """A PNG from its parts; kind is its colour type, extra are chunks before the pixels."""
    head = struct.pack(">IIBBBBB", wide, len(rows), depth, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def deep_png(array: Array, kind: int, *extra: bytes) -> bytes:
    return png([row.astype(">u2").tobytes() for row in array], 16, kind, *extra)


def tiff(array: Array, meaning: int, order: str = "<", bits: int = 0, **tags: tuple[int, ...]) -> bytes:
    """An uncompressed TIFF; meaning is its PhotometricInterpretation, tags are `t` and their number."""
    high, wide, channels = array.shape
    depth = array.dtype.itemsize * 8
    body = array.astype(array.dtype.newbyteorder(order)).tobytes()
    if bits == 12:  # packed, which leaves no room in a row of even width
        depth = 12
        text = "".join(format(int(value), "012b") for value in array.ravel())
        body = bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))
    values = {256: (wide,), 257: (high,), 258: (depth,) * channels, 259: (1,), 262: (meaning,), 273: (8,)}
    values |= {277: (channels,), 278: (high,), 279: (len(body),)}
    values |= {int(key[1:]): value for key, value in tags.items()}
    at = 8 + len(body)
    places, long = b"", b""
    behind = at + 2 + 12 * len(values) + 4
    for tag, shorts in sorted(values.items()):
        data = struct.pack(f"{order}{len(shorts)}H", *shorts)
        if len(data) > 4:
            data, long = struct.pack(f"{order}I", behind + len(long)), long + data
        places += struct.pack(f"{order}HHI", tag, 3, len(shorts)) + data.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return head + body + struct.pack(f"{order}H", len(values)) + places + b"\0" * 4 + long


def bmp(array: Array) -> bytes:
    """A BMP of 32 bits whose header says where its alpha lies."""
    high, wide, _ = array.shape
    masks = struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 56, wide, high, 1, 32, 3, high * wide * 4, 0, 0, 0, 0) + masks
    body = array[::-1].tobytes()  # from the bottom up
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(body), 0, 0, 14 + len(head)) + head + body


def shown_by(array: Array, mode: str) -> Array:
    """What is left of an array in another mode of Pillow."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(array)).convert(mode).convert("RGB"))


def palette(alpha: bytes = b"") -> bytes:
    """Colours by number: the rows of ALL, each once."""
    colours = ALL[:, :, :3].reshape(-1, 3)
    rows = [bytes(range(WIDE * row, WIDE * (row + 1))) for row in range(HIGH)]
    more = [chunk(b"tRNS", alpha)] if alpha else []
    return png(rows, 8, 3, chunk(b"PLTE", colours.tobytes()), *more)


def two(kind: str, first: Array = ALL[:, :, :3], **more: Any) -> bytes:
    second = Image.fromarray(np.ascontiguousarray(255 - first))
    return saved(first, kind, save_all=True, append_images=[second], **more)


class Case(NamedTuple):
    data: bytes
    name: str
    expected: Array
    mode: str
    notes: tuple[str, ...] = ()
    within: int = 0  # levels of 255
    frames: int = 1
    alpha: bool = False


FOUR = np.array([[0, 1, 2, 3, 3, 2, 1, 0]], np.uint8)  # of 2 bits, packed in TWO_BITS
TWO_BITS = [bytes([0b00011011, 0b11100100])]
FIRST_DEEP = chunk(b"tRNS", DEEP[1, 2, :3].astype(">u2").tobytes())
IS_FIRST = (DEEP[:, :, :3] != DEEP[1, 2, :3]).any(axis=2) * 255
FIRST_GRAY = chunk(b"tRNS", DEEP[1, 2, :1].astype(">u2").tobytes())
IS_GRAY = (DEEP[:, :, 0] != DEEP[1, 2, 0]) * 255
SWAPPED = DEEP[:, :, [2, 1, 0, 3]]  # OpenCV writes blue first
INKS = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8)
INKED = np.array([[[255, 255, 255], [0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]], np.uint8)
PLAIN_CMYK = "CMYK without a colour profile: converted as (1 - ink) (1 - black)"
TWELVE = (DEEP[:, :6, :1] >> 4).astype(np.uint16)
SOLID = np.full((HIGH, WIDE, 3), 100, np.uint8)
MULTIPLIED = np.dstack([SOLID // 2, np.full((HIGH, WIDE), 128, np.uint8)])


def cmyk(array: Array, kind: str, **more: Any) -> bytes:
    stream = BytesIO()
    Image.fromarray(np.ascontiguousarray(array), "CMYK").save(stream, kind, **more)
    return stream.getvalue()


def lzw_tiff(array: Array) -> bytes:
    found, data = cv2.imencode(".tiff", np.ascontiguousarray(array))
    assert found
    return data.tobytes()


def png_cases() -> dict[str, Case]:
    def case(data: bytes, expected: Array, mode: str, *notes: str, **more: Any) -> Case:
        return Case(data, "a.png", expected, mode, notes, **more)

    clear = {"alpha": True}
    spread = bytes(range(100, 100 + WIDE * HIGH))
    numbers = np.arange(100, 100 + WIDE * HIGH).reshape(HIGH, WIDE)
    level = FOUR * np.uint8(85)
    gamma = png([row.tobytes() for row in GRAY], 8, 0, chunk(b"gAMA", struct.pack(">I", 100000)))
    return {
        "rgb": case(saved(RGB, "PNG"), RGB, "RGB"),
        "rgba": case(saved(ALL, "PNG"), on(RGB, ALPHA), "RGBA", LAID, **clear),
        "rgba, all opaque": case(saved(np.dstack([RGB, GRAY * 0 + 255]), "PNG"), RGB, "RGBA", **clear),
        "gray": case(saved(GRAY, "PNG"), grey(GRAY), "L"),
        "gray, alpha": case(
            saved(ALL[:, :, ::3], "PNG"), on(grey(GRAY), ALPHA), "LA", LAID, **clear
        ),
        "1 bit": case(saved(BITS, "PNG"), grey(BITS * 255), "1"),
        "2 bits": case(png(TWO_BITS, 2, 0, wide=8), grey(level), "L"),
        "2 bits, one value clear": case(
            png(TWO_BITS, 2, 0, chunk(b"tRNS", b"\0\1"), wide=8),
            on(grey(level), (FOUR != 1) * 255), "L", LAID, **clear,
        ),
        "1 bit, one value clear": case(
            png([bytes([0b10100000])], 1, 0, chunk(b"tRNS", b"\0\0"), wide=3), np.full((1, 3, 3), 255), "1",
            LAID, **clear,
        ),
        "palette": case(palette(), RGB, "P"),
        "palette, alpha": case(palette(spread), on(RGB, numbers), "P", LAID, **clear),
        "palette, one clear": case(
            palette(b"\xff\xff\0"), on(RGB, (numbers != 102) * 255), "P", LAID, **clear
        ),
        "rgb, one colour clear": case(
            png([row.tobytes() for row in RGB], 8, 2, chunk(b"tRNS", RGB[1, 2].astype(">u2").tobytes())),
            on(RGB, (RGB[1, 2] != RGB).any(axis=2) * 255), "RGB", LAID, **clear,
        ),
        "gray 16": case(deep_png(DEEP[:, :, :1], 0), grey(bytes_of(DEEP[:, :, 0])), "I;16", DEEP_NOTE),
        "gray 16, one value clear": case(
            deep_png(DEEP[:, :, :1], 0, FIRST_GRAY),
            on(grey(bytes_of(DEEP[:, :, 0])), IS_GRAY), "I;16", DEEP_NOTE, LAID, **clear,
        ),
        "rgb 16": case(deep_png(DEEP[:, :, :3], 2), bytes_of(DEEP[:, :, :3]), "RGB;16", DEEP_NOTE),
        "rgb 16, one colour clear": case(
            deep_png(DEEP[:, :, :3], 2, FIRST_DEEP),
            on(bytes_of(DEEP[:, :, :3]), IS_FIRST), "RGB;16", DEEP_NOTE, LAID, **clear,
        ),
        "gray, alpha 16": case(
            deep_png(DEEP[:, :, :2], 4), on(grey(bytes_of(DEEP[:, :, 0])), bytes_of(DEEP[:, :, 1])),
            "RGBA;16", DEEP_NOTE, LAID, **clear,
        ),
        "rgba 16": case(
            deep_png(DEEP, 6), on(bytes_of(DEEP[:, :, :3]), bytes_of(DEEP[:, :, 3])), "RGBA;16",
            DEEP_NOTE, LAID, **clear,
        ),
        "animated": case(two("PNG"), RGB, "RGB", FIRST, frames=2),
        "gamma": case(gamma, grey(GRAY), "L", "its gamma of 1 is not used"),
    }  # fmt: skip


def tiff_cases() -> dict[str, Case]:
    def case(data: bytes, expected: Array, mode: str, *notes: str, **more: Any) -> Case:
        return Case(data, "a.tif", expected, mode, notes, **more)

    clear = {"alpha": True}
    deep, deep_gray = DEEP[:, :, :3], DEEP[:, :, :1]
    shown = bytes_of(deep)
    cut = "16 bits a channel, the upper 8 are used"
    return {
        "rgb": case(saved(RGB, "TIFF"), RGB, "RGB"),
        "rgb, lzw": case(saved(RGB, "TIFF", compression="tiff_lzw"), RGB, "RGB"),
        "rgb, deflate": case(saved(RGB, "TIFF", compression="tiff_deflate"), RGB, "RGB"),
        "rgba": case(saved(ALL, "TIFF"), on(RGB, ALPHA), "RGBA", LAID, **clear),
        "rgb multiplied by alpha": case(
            tiff(MULTIPLIED, 2, t338=(1,)), on(SOLID, np.full((HIGH, WIDE), 128)), "RGBA", LAID,
            within=1, **clear,
        ),
        "gray": case(saved(GRAY, "TIFF"), grey(GRAY), "L"),
        "gray, 0 is white": case(tiff(GRAY[:, :, None], 0), grey(255 - GRAY), "L"),
        "gray, alpha": case(saved(ALL[:, :, ::3], "TIFF"), on(grey(GRAY), ALPHA), "LA", LAID, **clear),
        "1 bit": case(saved(BITS, "TIFF"), grey(BITS * 255), "1"),
        "palette": case(saved(GRAY, "TIFF", "P"), grey(GRAY), "P"),
        "cmyk": case(cmyk(INKS, "TIFF"), INKED, "CMYK", PLAIN_CMYK),
        "cmyk 16": case(
            tiff(INKS.astype(np.uint16) * 257, 5), INKED, "CMYK;16", cut, PLAIN_CMYK
        ),
        "gray 12": case(
            tiff(TWELVE, 1, bits=12), grey(np.rint(TWELVE[:, :, 0] / 4095 * 255)), "I;16",
            "12 bits a channel, rounded to 8",
        ),
        "gray 16": case(tiff(deep_gray, 1), grey(shown[:, :, 0]), "I;16", DEEP_NOTE),
        "gray 16, big end first": case(tiff(deep_gray, 1, ">"), grey(shown[:, :, 0]), "I;16B", DEEP_NOTE),
        "gray 16, 0 is white": case(
            tiff(deep_gray, 0), grey(bytes_of(65535 - deep_gray[:, :, 0])), "I;16", DEEP_NOTE
        ),
        "rgb 16": case(tiff(deep, 2), shown, "RGB;16", DEEP_NOTE),
        "rgb 16, big end first": case(tiff(deep, 2, ">"), shown, "RGB;16", DEEP_NOTE),
        "rgb 16, lzw": case(lzw_tiff(SWAPPED[:, :, :3]), shown, "RGB;16", DEEP_NOTE),
        "rgba 16": case(
            tiff(DEEP, 2, t338=(2,)), on(shown, bytes_of(DEEP[:, :, 3])), "RGBA;16", DEEP_NOTE, LAID, **clear
        ),
        "rgb 16, turned": case(tiff(deep, 2, t274=(6,)), shown.swapaxes(0, 1)[:, ::-1], "RGB;16", DEEP_NOTE),
        "pages": case(two("TIFF"), RGB, "RGB", FIRST, frames=2),
    }  # fmt: skip


def other_cases() -> dict[str, Case]:
    full = {"quality": 100, "subsampling": 0}
    sharp = {"quality": 100, "subsampling": "4:4:4"}
    one = BLOCKS[:, :, 0]
    return {
        "bmp rgb": Case(saved(RGB, "BMP"), "a.bmp", RGB, "RGB"),
        "bmp gray": Case(saved(GRAY, "BMP"), "a.bmp", grey(GRAY), "L"),
        "bmp 1 bit": Case(saved(BITS, "BMP"), "a.bmp", grey(BITS * 255), "1"),
        "bmp palette": Case(saved(RGB[:1], "BMP", "P"), "a.bmp", shown_by(RGB[:1], "P"), "P"),
        "bmp of 32 bits": Case(saved(ALL, "BMP"), "a.bmp", RGB, "RGB"),  # the fourth byte means nothing
        "bmp rgba": Case(bmp(ALL), "a.bmp", on(RGB, ALPHA), "RGBA", (LAID,), alpha=True),
        "webp": Case(saved(RGB, "WEBP", lossless=True), "a.webp", RGB, "RGB"),
        "webp rgba": Case(
            saved(ALL, "WEBP", lossless=True, exact=True), "a.webp",
            on(RGB, ALPHA), "RGBA", (LAID,), alpha=True,
        ),
        "webp animated": Case(two("WEBP", lossless=True), "a.webp", RGB, "RGB", (FIRST,), frames=2),
        "webp lossy": Case(saved(GREYS, "WEBP", quality=100), "a.webp", GREYS, "RGB", within=3),
        "gif": Case(saved(GRAY, "GIF"), "a.gif", grey(GRAY), "P"),
        "gif animated": Case(two("GIF", GRAY), "a.gif", grey(GRAY), "P", (FIRST,), frames=2),
        "gif, one clear": Case(
            saved(GRAY, "GIF", transparency=int(GRAY[1, 2])), "a.gif",
            on(grey(GRAY), (GRAY[1, 2] != GRAY) * 255), "P", (LAID,), alpha=True,
        ),
        "avif": Case(saved(BLOCKS, "AVIF", **sharp), "a.avif", BLOCKS, "RGB", within=4),
        "avif rgba": Case(
            saved(np.dstack([BLOCKS, one]), "AVIF", **sharp), "a.avif",
            on(BLOCKS, one), "RGBA", (LAID,), within=4, alpha=True,
        ),
        "avif animated": Case(
            two("AVIF", BLOCKS, **sharp), "a.avif", BLOCKS, "RGB", (FIRST,), 4, 2
        ),
        "jpeg": Case(saved(BLOCKS, "JPEG", **full), "a.jpg", BLOCKS, "RGB", within=4),
        "jpeg gray": Case(saved(one, "JPEG", **full), "a.jpg", grey(one), "L", within=2),
        "jpeg progressive": Case(
            saved(BLOCKS, "JPEG", progressive=True, **full), "a.jpeg", BLOCKS, "RGB", within=4
        ),
        "jpeg cmyk": Case(
            cmyk(np.kron(INKS, np.ones((16, 16, 1), np.uint8)), "JPEG", **full), "a.jpg",
            np.kron(INKED, np.ones((16, 16, 1), np.uint8)), "CMYK", (PLAIN_CMYK,), within=2,
        ),
        "jpeg of two pictures": Case(two("MPO", BLOCKS, **full), "a.jpg", BLOCKS, "RGB", (FIRST,), 4, 2),
        "wrong ending": Case(
            saved(RGB, "PNG"), "shard.tar: 7.JPG", RGB, "RGB", ("its name ends in .jpg, its content is PNG",)
        ),
        "unknown ending": Case(saved(RGB, "PNG"), "hub:a/b train[12].image", RGB, "RGB"),
        "1 x 1": Case(saved(RGB[:1, :1], "PNG"), "a.png", RGB[:1, :1], "RGB"),
    }  # fmt: skip


TABLES: dict[str, Callable[[], dict[str, Case]]] = {
    "png": png_cases,
    "tiff": tiff_cases,
    "other": other_cases,
}
CASES = [
    pytest.param(case, id=f"{table}: {name}")
    for table, made in TABLES.items()
    for name, case in made().items()
]


def test_the_table_is_whole_and_every_format_can_be_read_here() -> None:
    assert {table: len(made()) for table, made in TABLES.items()} == {"png": 21, "tiff": 22, "other": 24}
    assert len(CASES) == 67
    assert all(features.check(name) for name in ("jpg", "webp", "avif", "libtiff", "littlecms2"))


@pytest.mark.parametrize("case", CASES)
def test_a_picture_is_what_lies_in_its_file(case: Case) -> None:
    picture, mask, notes = decode(case.data, case.name)
    assert picture.dtype == np.uint8 and picture.shape == case.expected.shape and mask is None
    off = np.abs(picture.astype(int) - case.expected).max()
    assert off == 0 if case.within == 0 else off <= case.within
    assert notes == case.notes
    high, wide = case.expected.shape[:2]
    assert facts(case.data, case.name) == Facts(wide, high, case.mode, case.frames, case.alpha)


def test_alpha_by_its_closed_form_for_every_colour_and_alpha() -> None:
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    drawn = np.dstack([colour, 255 - colour, colour // 2, alpha]).astype(np.uint8)
    data, seen = saved(drawn, "PNG"), 0
    for background in ((255, 255, 255), (0, 0, 0), (127, 128, 3)):
        picture, mask, notes = decode(data, "a.png", Reading(background=background))
        assert np.array_equal(picture, on(drawn[:, :, :3], alpha, background)) and mask is None
        assert notes == (f"transparent parts lie on the colour {background}",)
        seen += picture.size
    assert seen == 3 * 3 * 2**16


def test_alpha_as_a_mask_leaves_the_colours_as_they_are_stored() -> None:
    rules = Reading(alpha="mask")
    picture, mask, notes = decode(saved(ALL, "PNG"), "a.png", rules)
    assert np.array_equal(picture, RGB) and mask is not None and np.array_equal(mask, ALPHA) and not notes
    assert mask.dtype == np.uint8
    assert decode(saved(RGB, "PNG"), "a.png", rules).mask is None
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(saved(ALL, "PNG", exif=exif), "a.png", rules)
    assert turned.mask is not None
    assert np.array_equal(np.dstack([turned.picture, turned.mask]), ALL.swapaxes(0, 1)[:, ::-1])
    clear = saved(np.dstack([RGB, GRAY * 0]), "PNG")
    told = "every pixel is fully transparent"
    assert decode(clear, "a.png", rules).notes == (told,)
    assert decode(clear, "a.png").notes == (told, LAID) and (decode(clear, "a.png").picture == 255).all()


def test_files_by_their_path(tmp_path: Path) -> None:
    place = tmp_path / "a.png"
    place.write_bytes(saved(RGB, "PNG"))
    loaded: Picture = pictures.load(place)
    assert np.array_equal(loaded, RGB) and pictures.size(place) == (WIDE, HIGH)
