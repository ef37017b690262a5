"""What cannot be read as a picture is one error that names the picture and says why in plain words."""

from __future__ import annotations

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from tuner.data import pictures
from tuner.data.pictures import LIMIT, LIMIT_KEY, Reading, decode, facts
from tuner.errors import UserError

NOISE = np.random.default_rng(1).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def saved(kind: str, mode: str = "RGB", **more: Any) -> bytes:
    stream = BytesIO()
    Image.fromarray(NOISE).convert(mode).save(stream, kind, **more)
    return stream.getvalue()


def number(kind: str, mode: str) -> bytes:
    stream = BytesIO()
    Image.new(mode, (4, 4)).save(stream, kind)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(wide: int, high: int) -> bytes:
    """The header of a PNG of such a size, and a few of its bytes."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def box(brand: bytes, *further: bytes) -> bytes:
    return struct.pack(">I4s4sI", 16 + 4 * len(further), b"ftyp", brand, 0) + b"".join(further) + b"\0" * 40


PNG, JPEG, TIFF, WEBP, AVIF, BMP = (saved(kind) for kind in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF", "BMP"))
CUT = r"it is cut off or damaged \(.+\)"
PAGE = "it is a web page (HTML), as a download that failed leaves behind"
TEXT = "it is a text, not a picture; it begins with "
HUGE = f"100000 x 100000 pixels are more than the {LIMIT} allowed; {LIMIT_KEY} sets this limit"
BAD = {  # what: its bytes, the reason as a pattern
    "no bytes": (b"", re.escape("the file is empty (0 bytes)")),
    "zero bytes": (b"\0" * 5000, "it is nothing but zero bytes: it was not written completely"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body>", re.escape(PAGE)),
    "a web page, indented": (b"\xef\xbb\xbf\n  <HTML lang=en>", re.escape(PAGE)),
    "a text": ("größe: 3\n".encode(), re.escape(TEXT + "'größe: 3'")),
    "a long text": ("é".encode() * 3000, re.escape(TEXT + repr("é" * 40))),
    "json": (b'{"error": "not found"}', re.escape(TEXT) + "'{\"error\": \"not found\"}'"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer.* `git lfs .*"),
    "a drawing": (b"<svg xmlns='x'></svg>", "it is an SVG drawing, which has no pixels: save it as PNG"),
    "xml": (b"<?xml version='1.0'?>", r"it is XML \(an SVG drawing\?\), .*"),
    "pdf": (b"%PDF-1.7\n\xff\xfe", "it is a PDF document: save its pages as PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is a PostScript document: save it as PNG"),
    "zip": (b"PK\x03\x04\xff\xff", "it is a ZIP archive: unpack it"),
    "gzip": (b"\x1f\x8b\x08\0\0", "it is packed with gzip: unpack it"),
    "photoshop": (b"8BPS\0\1\xff", "it is a Photoshop document: save it as PNG"),
    "jpeg xl": (b"\xff\x0a\xfa\x1f", "it is JPEG XL: save it as PNG or JPEG"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "it is JPEG 2000: save it as PNG or JPEG"),
    "heic": (box(b"heic", b"mif1"), r"it is HEIC \(a telephone's photograph\): save it as JPEG or PNG.*"),
    "heic by another name": (box(b"mif1", b"heic"), "it is HEIC .*"),
    "avif without a picture": (box(b"mif1", b"avif"), "it begins as AVIF, but is cut off or damaged.*"),
    "a video": (box(b"isom", b"mp42"), r"it is a video \(MP4 or the like\), not a picture"),
    "random bytes": (NOISE.tobytes()[:300], "its content is none of JPEG, PNG, WEBP, AVIF, BMP, TIFF, GIF"),
    "png, cut in its header": (PNG[:20], r"it begins as PNG, but is cut off or damaged \(.+\)"),
    "png, cut": (PNG[: len(PNG) // 2], CUT),
    "png without its last chunk": (PNG[:-12], CUT),
    "png, a bit of its pixels flipped": (flipped(PNG, len(PNG) // 2), CUT),
    "jpeg, cut in its header": (JPEG[:30], r"it begins as JPEG, but is cut off or damaged \(.+\)"),
    "jpeg, cut": (JPEG[: len(JPEG) // 2], r"it is cut off or damaged \(.*truncated.*\)"),
    "webp, cut": (WEBP[: len(WEBP) // 2], "(it begins as WEBP, but|it) is cut off or damaged.*"),
    "avif, cut": (AVIF[: len(AVIF) // 2], "(it begins as AVIF, but|it) is cut off or damaged.*"),
    "bmp, cut": (BMP[: len(BMP) // 2], r"it is cut off or damaged \(.*truncated.*\)"),
    "tiff, cut": (TIFF[: len(TIFF) // 2], "(it begins as TIFF, but|it) is cut off or damaged.*"),
    "tiff, cut in its header": (TIFF[:6], "it begins as TIFF, but is cut off or damaged, or of a rare .*"),
    "a bomb": (png(100_000, 100_000), re.escape(HUGE) + ".*bomb.*"),
    "no pixels": (png(0, 5), "it begins as PNG, but is cut off or damaged"),
    "32-bit numbers": (number("TIFF", "I"), "its values are 32-bit or signed integers, which have no .*"),
    "floating point": (number("TIFF", "F"), "its values are floating point numbers, .*; save it with 8 .*"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_error_with_its_name_and_the_reason(what: str) -> None:
    data, reason = BAD[what]
    assert len(BAD) == 37
    with pytest.raises(UserError) as caught:
        decode(data, "folder/a.png")
    assert type(caught.value) is UserError
    assert re.fullmatch(rf"folder/a\.png: this picture cannot be read: {reason}", str(caught.value)), (
        caught.value
    )


def test_what_the_header_shows_needs_no_decoding() -> None:
    shown = [what for what in BAD if not _passes(BAD[what][0])]
    left = set(BAD) - set(shown)
    assert left <= {
        *("png, cut", "png without its last chunk", "png, a bit of its pixels flipped", "jpeg, cut"),
        *("webp, cut", "avif, cut", "bmp, cut", "tiff, cut"),
    }
    assert {"png, cut", "jpeg, cut", "bmp, cut"} <= left and "a bomb" in shown and len(shown) >= 29


def _passes(data: bytes) -> bool:
    try:
        facts(data, "a")
    except UserError:
        return False
    return True


def test_the_limit_is_checked_before_decoding_and_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=rf"60 x 40 pixels are more than the 2399 allowed; {LIMIT_KEY} sets"):
        decode(PNG, "a", Reading(limit=2399))
    with pytest.raises(UserError, match="60 x 40 pixels"):
        facts(PNG, "a", Reading(limit=2399))
    assert np.array_equal(decode(PNG, "a", Reading(limit=2400)).picture, NOISE)
    # Above what Pillow alone allows (2 * 89478485 pixels); the picture itself is then too short.
    data = png(20_000, 20_000)
    assert facts(data, "a", Reading(limit=10**9))[:2] == (20_000, 20_000)

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    with pytest.raises(UserError, match="20000 x 20000"):
        decode(data, "a")
    with pytest.raises(AssertionError, match="decoded"):
        decode(data, "a", Reading(limit=10**9))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF"])
def test_facts_read_the_header_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(kind)

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", never)
    assert facts(data, "a")[:2] == (60, 40)
    with pytest.raises(AssertionError, match="decoded"):
        decode(data, "a")


def test_facts_of_a_file_read_little_of_it() -> None:
    class Counted(BytesIO):
        got = 0

        def read(self, size: int | None = -1, /) -> bytes:
            found = super().read(size)
            self.got += len(found)
            return found

    noise = np.random.default_rng(2).integers(0, 256, (400, 600, 3)).astype(np.uint8)
    seen = 0
    for kind in ("JPEG", "PNG", "BMP", "TIFF"):
        whole = BytesIO()
        Image.fromarray(noise).save(whole, kind)
        stream = Counted(whole.getvalue())
        assert facts(stream, "a")[:2] == (600, 400)
        assert 0 < stream.got < len(whole.getvalue()) / 10, kind
        seen += 1
    assert seen == 4


def test_half_a_picture_does_not_pass_because_another_library_lets_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError, match="cut off"):
        decode(JPEG[: len(JPEG) // 2], "a")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    seen = 0
    for call in (pictures.load, pictures.size):
        for place, reason in ((tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(UserError, match=f"{re.escape(str(place))}: this picture .*: {reason}"):
                call(place)
            seen += 1
    assert seen == 4


WHOLE = {
    **{"png": PNG, "jpeg": JPEG, "tiff": TIFF, "webp": WEBP, "avif": AVIF, "bmp": BMP, "gif": saved("GIF")},
    **{
        "deep": saved("PNG", "I;16"),
        "lzw": saved("TIFF", compression="tiff_lzw"),
        "cmyk": saved("JPEG", "CMYK"),
    },
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged tags
@pytest.mark.parametrize("kind", WHOLE)
def test_damage_anywhere_is_an_error_or_a_whole_picture(kind: str) -> None:
    drawn, errors, wholes = np.random.default_rng(len(kind)), 0, 0
    for number_of in range(60):
        data = bytearray(WHOLE[kind])
        if number_of % 3 == 0:
            data = data[: drawn.integers(1, len(data))]
        else:  # in the header, or anywhere
            end = min(200, len(data)) if number_of % 3 == 1 else len(data)
            for place in drawn.integers(0, end, number_of % 5):
                data[place] ^= int(drawn.integers(1, 256))
        try:
            picture, mask, _ = decode(bytes(data), "a", Reading(limit=10**6))
        except UserError as error:
            assert str(error).startswith("a: this picture cannot be read: ")
            errors += 1
            continue
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and mask is None
        wholes += 1
    assert errors + wholes == 60 and errors >= 15 and wholes >= 8, (errors, wholes)
    assert len(WHOLE) == 10
