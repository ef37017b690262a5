"""Tars in the WebDataset manner: what has the same name before its first dot is one sample."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tuner.data.sources.rows import number_problem, told_captions
from tuner.data.sources.tree import CAPTIONS, PICTURES, hidden


class DamagedError(Exception):
    """An archive that is not whole."""


_ENDS: tuple[Any, Any] = (tarfile.EOFHeaderError, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]
"""A header of zeros, the mark of an archive's end; and none, where the file is at its end."""


class StrictInfo(tarfile.TarInfo):
    """As tarfile's, but a header that cannot be read is an error: tarfile takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> StrictInfo:
        """The next header.

        Raises:
            DamagedError: it is none, or the archive ends before its end mark.
        """
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, _ENDS[0]):  # the mark
                raise
            what = "it ends without its end mark" if isinstance(error, _ENDS[1]) else error
            raise DamagedError(f"damaged after {tarfile_.offset} bytes: {what}") from error


class Finding(NamedTuple):
    """Which endings are condition and mask: `canny` is that of 7.canny.png; None: there are none."""

    condition: str | None
    mask: str | None


class Part(NamedTuple):
    """A member of a sample: its name, where it lies, and its bytes where they were read."""

    name: str
    offset: int
    size: int
    data: bytes | None = None


@dataclass
class Group:
    """The members of one sample by their ending: everything after the first dot."""

    key: str
    parts: dict[str, Part] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Made(NamedTuple):
    """What a group is as a sample."""

    picture: Part
    captions: Sequence[str]
    condition: Part | None
    mask: Part | None
    scene: str | None
    weight: float
    kinds: Sequence[str] = ()


def refusal(member: tarfile.TarInfo) -> str | None:
    """Why a member is not taken: it would leave the folder, or is no plain file; None: it is taken."""
    parts = member.name.replace("\\", "/").split("/")
    if member.name.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
        return "refused: its name leads out of the archive"
    if member.issym() or member.islnk():
        return f"refused: a link, to {member.linkname}"
    if not member.isdir() and (not member.isreg() or member.issparse()):
        return "refused: a device or another special file, expected plain files"
    return None


def split(name: str) -> tuple[str, str] | None:
    """A member's sample and its ending, in small letters; None where it is hidden."""
    name = name.removeprefix("./")
    folder, _, base = name.rpartition("/")
    if any(hidden(part) for part in name.split("/")):
        return None
    stem, _, ending = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), ending.lower()


def is_text(ending: str) -> bool:
    """Whether a member is read at once: captions, and what is known of a sample."""
    return f".{ending}" in (*CAPTIONS, ".json")


def is_wanted(ending: str, finding: Finding) -> bool:
    """Whether a member is of any use."""
    return is_text(ending) or f".{ending}" in PICTURES or any(_belongs(ending, one) for one in finding)


def make(group: Group, finding: Finding, wrong: list[str]) -> Made | None:
    """A group as a sample; what is wrong is added to `wrong`, and then it is None."""
    parts = group.parts
    pictures = [part for ending, part in parts.items() if f".{ending}" in PICTURES]
    told = [*group.wrong]
    if len(pictures) != 1:
        names = ", ".join(part.name for part in pictures or parts.values())
        told.append(f"expected one picture, found {names}" if pictures else f"no picture, only {names}")
    others = [_other(parts, finding[i], ("condition", "mask")[i], told) for i in range(2)]
    about = _record(parts.get("json"), told)
    captions, kinds = _captions(parts, about, told)
    weight, scene = about.get("weight", 1.0), about.get("scene")
    if problem := number_problem(weight):
        told.append(problem)
    if told:
        wrong.append(f"{group.key}: {'; '.join(told)}")
        return None
    record = None if scene is None else json.dumps(scene)
    return Made(pictures[0], captions, others[0], others[1], record, float(weight), kinds)


def _belongs(ending: str, wanted: str | None) -> bool:
    """Whether `canny.png` is what `canny` or `canny.png` asks for."""
    if wanted is None:
        return False
    wanted = wanted.lower().lstrip(".")
    return ending == wanted or (
        os.path.splitext(ending)[0] == wanted and f".{ending.split('.')[-1]}" in PICTURES
    )


def _other(parts: dict[str, Part], wanted: str | None, what: str, told: list[str]) -> Part | None:
    if wanted is None:
        return None
    found = [part for ending, part in parts.items() if _belongs(ending, wanted)]
    if len(found) != 1:
        names = ", ".join(part.name for part in found or parts.values())
        told.append(f"expected one {what} ending in {wanted.lstrip('.')}.png or the like, found {names}")
    return found[0] if found else None


def _record(part: Part | None, told: list[str]) -> dict[str, Any]:
    """What the .json of a sample says."""
    if part is None:
        return {}
    try:
        found = json.loads(part.data or b"")
    except ValueError as error:  # also where it is not UTF-8
        told.append(f"{part.name}: not JSON: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _captions(
    parts: dict[str, Part], about: dict[str, Any], told: list[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """The captions, and their kinds where these are known."""
    texts = [parts[ending] for ending in ("txt", "caption") if ending in parts]
    if len(texts) > 1:
        told.append(f"several captions: {texts[0].name} and {texts[1].name}; keep one")
    elif texts:
        try:
            return [(texts[0].data or b"").decode("utf-8-sig").strip().replace("\r\n", "\n")], ()
        except UnicodeDecodeError as error:
            told.append(f"{texts[0].name}: not UTF-8 text: {error}; save it as UTF-8")
    else:
        found = about.get("text", about.get("caption"))
        if found is None:
            told.append("no caption; expected a .txt, a .caption, or a .json with text in it")
        else:
            return told_captions(found, told)
    return (), ()
