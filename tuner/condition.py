"""`tuner condition`: the condition picture of one picture, by the code that training uses."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydantic
from PIL import Image, PngImagePlugin

from tuner import explain, yaml_source
from tuner.block import expand
from tuner.data import conditions, pictures
from tuner.data.conditions import inpaint
from tuner.data.transform import Transform
from tuner.errors import UserError

NOTE = "tuner.condition"
"""The text in a PNG file that says how its condition was made."""


class Wish(NamedTuple):
    """What is asked for.

    Attributes:
        kind: one of conditions.kinds().
        settings: its parameters, as `low=50` or `high=[100, 200]`.
        size: side of the square that is cut out, in pixels, as training does; None: the picture as it is.
        seed: for what is drawn at random; None: 0.
        mask: a picture that is white where the hole is, instead of a random one.
    """

    kind: str
    settings: tuple[str, ...] = ()
    size: int | None = None
    seed: int | None = None
    mask: Path | None = None


def parse(kind: str, settings: Sequence[str]) -> conditions.Condition:
    """The kind with its parameters.

    Raises:
        UserError: with every mistake in them.
    """
    start = yaml_source.Place((0, 0), f"--kind {kind}")
    document = yaml_source.Document("command line", {"kind": kind}, {(): start, ("kind",): start}, [])

    def written(tree: dict[str, object]) -> dict[str, object]:
        out = expand(conditions.Condition, tree)
        assert isinstance(out, dict)
        return out

    yaml_source.override(document, settings, written)
    found: conditions.Condition | None = None
    try:
        found = conditions.Condition.model_validate(document.tree)
    except pydantic.ValidationError as error:
        document.problems += explain.problems(error, conditions.Condition, document)
    if document.problems:
        told: list[yaml_source.Problem] = sorted(set(document.problems), key=lambda one: one.place.order)
        raise yaml_source.RecipeError(told)
    assert found is not None
    if found.kind == conditions.GIVEN:
        raise UserError(f"--kind {kind}: such conditions are given as pictures; there is nothing to make")
    return found


def write(picture: Path, wish: Wish, out: Path) -> list[str]:
    """Make the condition of a picture and write it as a PNG file; a hole is transparent.

    Returns:
        Lines to print.

    Raises:
        UserError: the wish cannot be fulfilled.
    """
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: expected a .png file, which keeps every pixel as it is")
    if wish.size is not None and wish.size < 1:
        raise UserError(f"--size {wish.size}: expected a number of pixels, at least 1")
    condition = parse(wish.kind, wish.settings)
    if wish.mask is not None and condition.kind != "inpaint":
        raise UserError(f"--mask has no effect: it belongs to --kind inpaint, not to {condition.kind}")
    for option, given in (("--set", bool(wish.settings)), ("--seed", wish.seed is not None)):
        if wish.mask is not None and given:
            raise UserError(f"{option} has no effect beside --mask, which is the hole")
    pixels = _cut(pictures.load(picture), wish.size)
    if wish.mask is None:
        made = conditions.make_condition(condition, pixels, conditions.Draw(wish.seed or 0), str(picture))
        told = conditions.parameters(condition)
    else:
        made = inpaint.with_hole(pixels, _hole(wish.mask, picture, wish.size))
        told = {"condition": "inpaint", "mask": "given"}
    _save(made, told, out)
    how = ", ".join(f"{key} {_plain(value)}" for key, value in told.items() if key != "condition")
    hidden = "" if made.shape[2] == 3 else f"; {np.mean(made[:, :, 3] == 0):.0%} hidden (transparent)"
    return [
        f"{out}: {condition.kind} of {picture.name}, {made.shape[1]}x{made.shape[0]} pixels"
        f"{', ' + how if how else ''}{hidden}"
    ]


def read(path: Path) -> conditions.Picture:
    """A condition picture from its file: uint8 [H, W, 3], or [H, W, 4] with a hole.

    Transparency is a hole only in files of `tuner condition`, which say so; in others it lies on white.

    Raises:
        UserError: the file is no picture.
    """
    shown = pictures.load(path)
    with Image.open(path) as opened:
        note = opened.info.get(NOTE) if opened.format == "PNG" and opened.mode == "RGBA" else None
        if not isinstance(note, str) or json.loads(note).get("condition") != "inpaint":
            return shown
        return inpaint.with_hole(shown, np.asarray(opened.getchannel("A")) < 128)


def _plain(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _cut(picture: conditions.Picture, size: int | None) -> conditions.Picture:
    return picture if size is None else Transform(size, size)(picture)


def _hole(mask: Path, picture: Path, size: int | None) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """Where the mask is white, bool [H, W], cut out like the picture."""
    seen = pictures.load(mask)
    (wide, high), (height, width) = pictures.size(picture), seen.shape[:2]
    if (width, height) != (wide, high):
        raise UserError(f"--mask {mask}: found {width}x{height} pixels, expected the picture's {wide}x{high}")
    hole = np.asarray(Image.fromarray(_cut(seen, size)).convert("L")) > 127  # above one half
    if not hole.any():
        raise UserError(f"--mask {mask}: it is black all over, so nothing would be hidden")
    return hole


def _save(made: conditions.Picture, told: dict[str, str | float], out: Path) -> None:
    """The file appears whole."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text(NOTE, json.dumps(told, sort_keys=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as file:
            Image.fromarray(made).save(file, "PNG", pnginfo=notes)
            file.flush()
            os.fsync(file.fileno())
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
