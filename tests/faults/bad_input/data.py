"""Sets of pictures: captions, listings, conditions, archives, tables, and how many there are."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from typing import Any

from .case import CAPTION, Case, World, case, picture, sets


def listing(*lines: Any, more: str = "") -> Callable[[World], None]:
    """data/ with a metadata.jsonl of these lines; a text is a line as it is."""

    def make(world: World) -> None:
        place = world.root / "data"
        for text in place.glob("*.txt"):
            text.unlink()
        written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (place / "metadata.jsonl").write_text("\n".join(written) + "\n" + more)

    return make


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"file_name": f"{number}.png", "text": CAPTION, **more}


ROWS = [row(number) for number in range(4)]


def tar(*members: tuple[Any, ...], cut: int | None = None, mode: str = "w") -> Callable[[World], None]:
    """A set that is the archive pictures.tar, of (name, bytes) or (name, bytes, type, link)."""

    def make(world: World) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=mode) as made:  # type: ignore[call-overload]
            for name, data, *kind in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if kind:
                    info.type, info.linkname, info.size = kind[0], kind[1], 0
                made.addfile(info, io.BytesIO(data))
        world.file("pictures.tar", stream.getvalue()[:cut])
        world.set("data.source", "pictures.tar")

    return make


GOOD = [
    (f"{n}.{ending}", data) for n in range(4) for ending, data in (("png", picture(n)), ("txt", b"a red toy"))
]


def table(columns: dict[str, list[Any]], **source: Any) -> Callable[[World], None]:
    def make(world: World) -> None:
        import datasets
        import pyarrow as pa
        import pyarrow.parquet

        world.patch.setattr(datasets.config, "HF_DATASETS_CACHE", world.root / "hf")
        pyarrow.parquet.write_table(pa.table(columns), world.root / "set.parquet")
        world.set("data.source", [{"path": "set.parquet", **source}])

    return make


def no_parquet(world: World) -> None:
    table({"image": [picture()], "text": ["a"]})(world)
    world.file("set.parquet", b"PAR1 and no more")


def private(world: World) -> None:
    """A table whose cell names a file of the user's that does not belong to the set."""
    world.file("home/private.png", picture(9))
    place = world.file("set/readme", "").parent
    cell = {"bytes": None, "path": str(world.root / "home" / "private.png")}
    table({"image": [cell] * 4, "text": ["a"] * 4})(world)
    shutil.move(world.root / "set.parquet", place / "set.parquet")
    world.set("data.source", "set/set.parquet")


def caption(data: bytes | None, name: str = "2.txt") -> Callable[[World], None]:
    def make(world: World) -> None:
        if data is None:
            (world.root / "data" / name).unlink()
        else:
            world.file(f"data/{name}", data)

    return make


def controlled(change: Callable[[World], Any], **source: Any) -> Callable[[World], None]:
    """Conditions are given, in data/edges/; then something is wrong with one."""

    def make(world: World) -> None:
        for number in range(4):
            world.file(f"data/edges/{number}.png", picture(number + 9))
        world.method("controlnet", condition="image")
        world.set("data.source", [{"path": "data", "condition_from": "edges/", **source}])
        change(world)

    return make


def emptied(world: World) -> None:
    for place in (world.root / "data").iterdir():
        place.unlink()


def alone(world: World) -> None:
    for number in range(1, 4):
        (world.root / "data" / f"{number}.png").unlink()
        (world.root / "data" / f"{number}.txt").unlink()


def offline(world: World) -> None:
    import datasets
    import huggingface_hub

    world.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    world.patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    world.patch.setattr(datasets.config, "HF_DATASETS_CACHE", world.root / "hf")
    world.set("data.source", "hub:owner/name")


def two_sources(world: World) -> None:
    world.pictures(4, "more")
    world.set("data.source", [{"path": "data", "share": 1.0}, {"path": "more"}])


def masked(size: tuple[int, int]) -> Callable[[World], None]:
    def make(world: World) -> None:
        for number in range(4):
            world.file(
                f"data/{number}_mask.png", picture(number, mode="L", size=size if number == 2 else (64, 64))
            )
        world.set("data.source", [{"path": "data", "mask_from": "_mask"}])

    return make


CAPTIONS = [
    case("Latin-1", caption("größe".encode("latin-1")), "data/2.png: its caption data/2.txt: not UTF-8 text",
         "byte 0xf6", "save it as UTF-8"),
    case("UTF-16", caption("a red toy".encode("utf-16")),
         "data/2.png: its caption data/2.txt: not UTF-8 text", "byte 0xff", "save it as UTF-8"),
    case("none", caption(None), "data/2.png: no caption", "expected 2.txt beside it, or a metadata.jsonl"),
    case("two", caption(b"a toy", "2.caption"), "data/2.png: several captions", "keep one"),
    case("of no kind", sets(data__captions={"choose": {"long": 1.0}}),
         "data/0.png: expected a caption of kind long", "4 of 4"),
    case("a listing that is not there", sets(data__source=[{"path": "data", "captions_from": "listing"}]),
         "data: captions_from is listing", "metadata.jsonl or metadata.csv"),
]  # fmt: skip

LISTINGS = [
    case("no JSON", listing(*ROWS, "{file_name: 3.png}"), "data/metadata.jsonl:5: not JSON", "property name"),
    case("leaves the folder", listing(*ROWS, {"file_name": "../other.png", "text": "a"}), "metadata.jsonl:5",
         "../other.png leaves the folder"),
    case("an absolute name", listing(*ROWS, {"file_name": "/etc/hostname", "text": "a"}), "metadata.jsonl:5",
         "/etc/hostname leaves the folder"),
    case("no such picture", listing(*ROWS, row(9)), "metadata.jsonl:5: 9.png: no such picture",
         "metadata.jsonl"),
    case("not listed", listing(*ROWS[:3]), "data/3.png: not listed in metadata.jsonl",
         "list it or move it away"),
    case("no name", listing(*ROWS, {"image": "3.png"}), "data/metadata.jsonl:5: expected an object",
         "with a file_name"),
    case("a number for a caption", listing(*ROWS[:3], {"file_name": "3.png", "text": 5}),
         "metadata.jsonl:4: 3.png", "expected text", "found 5"),
    case("a weight below 0", listing(*ROWS[:3], row(3, weight=-1)), "metadata.jsonl:4: 3.png",
         "a number of at least 0, found -1"),
    case("a weight of 0", listing(*ROWS[:3], row(3, weight=0)), "data/3.png: its weight is 0",
         "give it a weight above 0"),
    case("two listings", lambda w: (listing(*ROWS)(w), w.file("data/metadata.csv",
         "file_name,text\n0.png,a\n")), "metadata.csv", "keep one"),
    case("cells", lambda w: (emptied(w), w.pictures(1), (w.root / "data/0.txt").unlink(),
         w.file("data/metadata.csv", "file_name,text\n0.png,a,b\n")),
         "metadata.csv:2: found another number of cells", "than the first line has columns"),
    case("a column", lambda w: (listing(*ROWS)(w), w.set("data.source", [{"path": "data",
         "columns": {"caption": "txet"}}])),
         "metadata.jsonl", "txet", "did you mean text?"),
    case("Latin-1 in a listing",
         lambda w: (listing(*ROWS)(w), w.file("data/metadata.jsonl",
         b'{"file_name": "0.png", "text": "\xe4"}\n')),
         "data/metadata.jsonl: not UTF-8 text: line 1", "save it as UTF-8"),
]  # fmt: skip

CONDITIONS = [
    case("no condition", controlled(lambda w: (w.root / "data/edges/2.png").unlink()),
         "data/2.png: no condition picture", "expected edges/2.*"),
    case("no conditions at all", lambda w: w.method("controlnet", condition="image"),
         "data/0.png: no conditioning_image", "4 of 4 samples"),
    case("a condition's picture", controlled(lambda w: w.file("data/edges/2.png", b"")), "data/edges/2.png",
         "the file is empty", "1 of 4"),
    case("a condition's shape", controlled(lambda w: w.file("data/edges/2.png", picture(2, size=(64, 32)))),
         "data/edges/2.png", "the picture", "1 of 4 samples"),
    case("conditions elsewhere", controlled(lambda w: w.set("data.source.0.condition_from", "egdes/")),
         "data/egdes: no such folder", "edges/"),
    case("a kind of condition", lambda w: w.method("controlnet", condition="cany"),
         "controlnet.condition.kind: found cany", "mean canny?"),
    case("conditions in vain", sets(data__source=[{"path": "data", "condition": "canny"}]),
         "data.source.0.condition: method lora", "set null"),
    case("a mask's shape", masked((32, 64)), "data/2_mask.png", "1 of 4 samples cannot be used"),
    case("no masks", sets(data__masks={}), "data.masks: no sample has a mask", "data.source.mask_from"),
]  # fmt: skip

NUMBERS = [
    case("no such folder", sets(data__source="dtaa"), "dtaa: no such folder",
         "beside it there are: base, cache, data"),
    case("an empty folder", emptied, "data: no pictures found", ".tif, .tiff, .webp)\n"),
    case("captions alone", lambda w: [p.unlink() for p in (w.root / "data").glob("*.png")],
         "data: no pictures found", "4 captions are there without a picture"),
    case("a picture for a folder", sets(data__source="data/0.png"), "data/0.png: is a file",
         "expected a folder, an archive or a table"),
    case("one sample", alone, "train.batch_size: 2 pictures in a batch", "an epoch has only 1",
         "data.source.repeats"),
    case("more than there are", sets(train__batch_size=9), "train.batch_size: 9 pictures",
         "has only 4; take at most that"),
    case("shares", two_sources, "data.source.1.share: found none", "give all one"),
    case("held out nowhere", sets(data__heldout="nowhere"), "nowhere: no such folder",
         "no prepare.py beside it"),
    case("a year for repeats", lambda w: w.pictures(2, "data/2024_photos"),
         "data/2024_photos: its name means 2024", "folder_repeats: true"),
    case("a set that is not here", offline, "hub:owner/name: ",
         "HF_HUB_OFFLINE is set, and it was not downloaded before"),
]  # fmt: skip

ARCHIVES = [
    case("a path that escapes", tar(*GOOD, ("../../escaped.png", picture())),
         "pictures.tar: ../../escaped.png: refused", "leads out of the archive"),
    case("an absolute path", tar(*GOOD, ("/tmp/escaped.png", picture())), "/tmp/escaped.png: refused",
         "leads out of the archive"),
    case("a link", tar(*GOOD, ("9.png", b"", tarfile.SYMTYPE, "/etc/passwd")),
         "9.png: refused: a link, to /etc/passwd", "pictures.tar"),
    case("a device", tar(*GOOD, ("9.png", b"", tarfile.CHRTYPE, "")), "9.png: refused: a device",
         "expected plain files"),
    case("cut off", tar(*GOOD, cut=20_000), "pictures.tar: unexpected end of data",
         "the archive is damaged: copy it whole"),
    case("packed", tar(*GOOD, mode="w:gz"), "pictures.tar: ", "it is compressed: unpack it to a plain .tar"),
    case("no caption inside", tar(*GOOD, ("9.png", picture())), "pictures.tar: 9: no caption",
         "expected a .txt"),
    case("twice inside", tar(*GOOD, GOOD[0]), "pictures.tar: 0: 0.png: it is there twice", "1 of 4 samples"),
    case("no picture inside", tar(*GOOD, ("9.txt", b"a")), "pictures.tar: 9: no picture, only 9.txt",
         "no picture"),
    case("no archive", sets(data__source="gone.tar"), "gone.tar: no such archive", "gone.tar"),
    case("no table", no_parquet, "set.parquet", "Parquet"),
    case("no column", table({"picture": [picture()], "text": ["a"]}), "set.parquet: ", "columns.picture",
         "picture"),
    case("a cell that leads elsewhere", private, "set/set.parquet[0].image", "private.png",
         "leaves the folder"),
    case("no such table", sets(data__source="gone.parquet"), "gone.parquet: no such file", "gone.parquet"),
]  # fmt: skip

DATA: list[Case] = [*CAPTIONS, *LISTINGS, *CONDITIONS, *NUMBERS, *ARCHIVES]
