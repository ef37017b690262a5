"""The recipe's block for a set of pictures: where they lie, and what is found where in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuner.block import Block, Conflict

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Kind = Literal["folder", "hub", "table", "saved", "tars", "urls"]

HUB = "hub:"
ONLY = {
    "captions_from": ("folder",),
    "folder_repeats": ("folder",),
    "condition_from": ("folder", "tars", "urls"),
    "mask_from": ("folder", "tars", "urls"),
    "columns": ("folder", "hub", "table", "saved"),
    "revision": ("hub",),
    "config": ("hub",),
    "split": ("hub", "saved"),
    "streaming": ("hub", "table", "tars"),
    "buffer": ("hub", "table", "tars", "urls"),
}
"""The kinds of source that a key has an effect for; keys that are not here have one for all."""

WORDS: dict[Kind, str] = {
    "folder": "a folder of pictures",
    "hub": "a set on the Hub",
    "table": "Parquet or Arrow files",
    "saved": "a set that was saved to disk",
    "tars": "local tars",
    "urls": "streamed tars",
}


class Columns(Block):
    """The names of a table's columns, or of the fields in a folder's listing."""

    picture: Text | None = Field(None, description="the pictures; null: image, in a listing file_name")
    caption: Text | Annotated[dict[Text, Text], Field(min_length=1)] | None = Field(
        None,
        description="the captions, each one, a list, or lists by kind; columns by kind: "
        "{long: caption, short: title}; null: text",
    )
    condition: Text | None = Field(
        None, description="condition pictures; null: conditioning_image, if it is there"
    )
    mask: Text | None = Field(None, description="mask pictures; null: mask, if it is there")
    weight: Text | None = Field(None, description="weights in the loss; null: weight, if it is there")
    scene: Text | None = Field(None, description="records of the shapes world; null: scene, if it is there")

    def captions(self, usual: str) -> dict[str, str]:
        """The caption columns by kind; the one column of captions without a kind by the empty word."""
        return self.caption if isinstance(self.caption, dict) else {"": self.caption or usual}


class SourceSpec(Block):
    """A set of pictures."""

    short: ClassVar[str | None] = "path"

    path: Text = Field(
        description="a folder; hub:owner/name; *.parquet or *.arrow; a folder of save_to_disk; "
        "*.tar, or http(s)://.../{000..009}.tar"
    )
    repeats: Positive = Field(1, description="how often each of its pictures comes in one epoch")
    weight: float = Field(1.0, ge=0, description="of its samples in the loss")
    captions_from: Literal["listing", "beside", "name"] | None = Field(
        None,
        description="metadata.jsonl or .csv; .txt or .caption beside the picture; the file's name; "
        "null: the listing if there is one, else beside",
    )
    condition_from: Text | None = Field(
        None,
        description="where condition pictures lie: edges/ is a folder of the same names, _canny what is put "
        "behind a name (a_canny.png), in tars a part of the ending (canny: 7.canny.png)",
    )
    mask_from: Text | None = Field(None, description="where mask pictures lie, as condition_from")
    folder_repeats: bool | None = Field(
        None,
        description="whether a subfolder 10_name comes 10 times; null: yes, but an error above 300 times",
    )
    columns: Columns = Field(Columns(), description="names of columns")
    revision: Text | None = Field(None, description="branch, tag or commit of a set on the Hub")
    config: Text | None = Field(None, description="configuration of a set on the Hub; null: its only one")
    split: Text | None = Field(None, description="part of a set; null: train")
    streaming: bool = Field(
        False, description="read in passing instead of downloaded or indexed first; tars at addresses always"
    )
    buffer: Positive = Field(1000, description="samples that a stream is shuffled among")

    @property
    def kind(self) -> Kind:
        """What the path leads to; looks at the disk only for a folder's kind."""
        path = self.path
        if path.startswith(HUB):
            return "hub"
        if re.match(r"https?://", path):
            return "urls"
        if re.search(r"\.tar(\.\w+)?$|\.tgz$", path) and not Path(path).is_dir():
            return "tars"
        if path.endswith((".parquet", ".arrow")) and not Path(path).is_dir():
            return "table"
        return "saved" if saved(Path(path)) else "folder"

    @property
    def streamed(self) -> bool:
        """Whether it is read in passing."""
        return self.kind == "urls" or (self.streaming and self.kind in ONLY["streaming"])

    def unused(self) -> dict[str, str]:
        """Keys that this kind of source has no use for."""
        kind = self.kind
        gone = {key: f"path is {WORDS[kind]}" for key, kinds in ONLY.items() if kind not in kinds}
        if self.streamed:
            gone["repeats"] = "the set is streamed, and comes again whenever it is at its end"
        elif kind in ONLY["streaming"]:
            gone["buffer"] = "the set is not streamed, so it is shuffled as a whole"
        if kind == "folder" and self.captions_from in ("beside", "name"):
            gone["columns"] = f"captions_from is {self.captions_from}, so no listing is read"
        return gone

    def conflicts(self) -> Iterator[Conflict]:
        """A Hub set without a full name; one place for condition and mask."""
        if self.kind == "hub" and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.path.removeprefix(HUB)):
            yield Conflict(("path",), f"found '{self.path}', expected hub:owner/name")
        if self.condition_from is not None and self.condition_from == self.mask_from:
            yield Conflict(("mask_from", "condition_from"), f"both are {self.mask_from}, expected two places")


def saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk: of one set, or of several splits."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
