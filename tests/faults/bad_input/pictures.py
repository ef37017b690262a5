"""Pictures that cannot be read, or not trained on."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from .case import Case, World, case, picture


def broken(data: bytes | str, name: str = "2.png") -> Callable[[World], None]:
    """One of the four pictures is this."""

    def make(world: World) -> None:
        (world.root / "data" / "2.png").unlink()
        world.file(f"data/{name}", data)

    return make


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(wide: int, high: int) -> bytes:
    """A PNG of such a size that holds few of its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def too_large(world: World) -> None:
    world.set("data.max_pixels", 2000)
    world.set("data.unreadable", 1)


def two_kinds(world: World) -> None:
    world.file("data/1.png", b"")
    world.file("data/3.png", b"GIF89a")


def dangling(world: World) -> None:
    (world.root / "data" / "2.png").unlink()
    (world.root / "data" / "2.png").symlink_to("gone.png")


def number(mode: str) -> bytes:
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.new(mode, (64, 64)).save(stream, "TIFF")
    return stream.getvalue()


HEIC = struct.pack(">I4s4sI", 24, b"ftyp", b"heic", 0) + b"mif1" + b"\0" * 40
VIDEO = struct.pack(">I4s4sI", 24, b"ftyp", b"isom", 0) + b"mp42" + b"\0" * 40
ONE = "1 of 4 samples cannot be used; data.unreadable"

PICTURES: list[Case] = [
    case("empty", broken(b""), "data/2.png: this picture", "the file is empty (0 bytes)", ONE),
    case("zeros", broken(b"\0" * 999), "data/2.png", "nothing but zero bytes", ONE),
    case("a web page", broken("<!DOCTYPE html><html>404</html>"), "data/2.png", "a web page (HTML)", ONE),
    case("a text", broken("hello"), "data/2.png", "it is a text, not a picture; it begins with 'hello'", ONE),
    case("a pointer", broken("version https://git-lfs.github.com/spec/v1\n"), "data/2.png", "git lfs pull",
         ONE),
    case("a drawing", broken("<svg xmlns='x'></svg>"), "data/2.png", "an SVG drawing", "save it as PNG", ONE),
    case("a document", broken(b"%PDF-1.7\n\xff\xfe"), "data/2.png", "a PDF document: save its pages", ONE),
    case("an archive", broken(b"PK\x03\x04\xff\xff"), "data/2.png", "a ZIP archive: unpack it", ONE),
    case("packed", broken(b"\x1f\x8b\x08\0\0"), "data/2.png", "packed with gzip: unpack it", ONE),
    case("a telephone's", broken(HEIC, "2.jpg"), "data/2.jpg", "it is HEIC", "save it as JPEG or PNG", ONE),
    case("a video", broken(VIDEO), "data/2.png", "it is a video (MP4 or the like)", ONE),
    case("JPEG XL", broken(b"\xff\x0a\xfa\x1f"), "data/2.png", "it is JPEG XL: save it as PNG", ONE),
    case("noise", broken(bytes(range(255, 0, -1))), "data/2.png", "its content is none of JPEG, PNG", ONE),
    case("half a PNG", broken(picture()[:4000]), "data/2.png", "it is cut off or damaged", ONE),
    case("a PNG's beginning", broken(picture()[:20]), "data/2.png", "it begins as PNG, but is cut off", ONE),
    case("half a JPEG", broken(picture(0, "JPEG")[:1500], "2.jpg"), "data/2.jpg", "truncated", ONE),
    case("half a WebP", broken(picture(0, "WEBP")[:900], "2.webp"), "data/2.webp", "cut off or damaged", ONE),
    case("floating point", broken(number("F"), "2.tif"), "data/2.tif", "floating point numbers",
         "save it with 8", ONE),
    case("32 bits", broken(number("I"), "2.tif"), "data/2.tif", "32-bit or signed integers", ONE),
    case("a bomb", broken(header(100_000, 100_000)), "data/2.png", "100000 x 100000 pixels are more than",
         "data.max_pixels sets this limit"),
    case("above the limit", too_large, "data/0.png", "64 x 64 pixels are more than the 2000 allowed",
         "data.max_pixels", "4 of 4"),
    case("two of them", two_kinds, "data/1.png", "data/3.png",
         "2 of 4 samples cannot be used; data.unreadable"),
    case("a link that leads nowhere", dangling, "data/2.png: a link that leads nowhere",
         "mend it or take it away"),
]  # fmt: skip
