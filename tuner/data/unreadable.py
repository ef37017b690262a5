"""What is wrong with a file that cannot be read as a picture, in plain words, from how it begins."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

DAMAGE = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(OverflowError, ZeroDivisionError, RuntimeError, NotImplementedError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
"""What Pillow raises on damaged files: it has no one error for them."""

STARTS = (  # of a file that is no picture, or one of another kind: what it is, what to do
    (b"version https://git-lfs", "it is a Git LFS pointer, not the picture itself: run `git lfs pull`"),
    (b"<!doctype html", "it is a web page (HTML), as a download that failed leaves behind"),
    (b"<html", "it is a web page (HTML), as a download that failed leaves behind"),
    (b"<svg", "it is an SVG drawing, which has no pixels: save it as PNG"),
    (b"<?xml", "it is XML (an SVG drawing?), which has no pixels: save it as PNG"),
    (b"%pdf", "it is a PDF document: save its pages as PNG"),
    (b"%!ps", "it is a PostScript document: save it as PNG"),
    (b"pk\x03\x04", "it is a ZIP archive: unpack it"),
    (b"\x1f\x8b", "it is packed with gzip: unpack it"),
    (b"8bps", "it is a Photoshop document: save it as PNG"),
    (b"\xff\x0a", "it is JPEG XL: save it as PNG or JPEG"),
    (b"\x00\x00\x00\x0cjxl ", "it is JPEG XL: save it as PNG or JPEG"),
    (b"\x00\x00\x00\x0cjp  ", "it is JPEG 2000: save it as PNG or JPEG"),
)

MARKS = (  # how a format that is read begins, and where
    ("JPEG", 0, (b"\xff\xd8",)),
    ("PNG", 0, (b"\x89PNG",)),
    ("WEBP", 8, (b"WEBP",)),
    ("AVIF", 4, (b"ftypavif", b"ftypavis")),
    ("BMP", 0, (b"BM",)),
    ("TIFF", 0, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    ("GIF", 0, (b"GIF8",)),
)


def what(head: bytes, formats: tuple[str, ...]) -> str:
    """Why a file cannot be read as a picture, from its first bytes (up to 4096 are enough).

    Args:
        formats: the formats that are read, for the case that it is none known here either.
    """
    if not head:
        return "the file is empty (0 bytes)"
    if not head.strip(b"\0"):
        return "it is nothing but zero bytes: it was not written completely"
    for name, start, marks in MARKS:
        if head[start:].startswith(marks):
            more = ", or of a rare kind that Pillow does not read" if name in ("TIFF", "AVIF") else ""
            return f"it begins as {name}, but is cut off or damaged{more}"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1"):
            if b"avif" in head[12:64]:  # among the further kinds that it says to be compatible with
                return "it begins as AVIF, but is cut off or damaged"
            return "it is HEIC (a telephone's photograph): save it as JPEG or PNG"
        return "it is a video (MP4 or the like), not a picture"
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start_of, words in STARTS:
        # White space stands before marks of texts only; a mark of bytes is taken as it lies.
        if begin.startswith(start_of) or head.startswith(start_of):
            return words
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.end < len(head):  # else the last character is only cut
            return f"its content is none of {', '.join(formats)}"
        text = head[: error.start].decode()
    if all(sign.isprintable() or sign.isspace() for sign in text):
        return f"it is a text, not a picture; it begins with {text.strip()[:40]!r}"
    return f"its content is none of {', '.join(formats)}"
