"""Colours by their ICC profile to sRGB, which is what every Stable Diffusion model was trained on."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # a picture's mode: the colour space of its profile

SAME = 1
"""A profile that moves no colour by more levels of 255 than this is sRGB itself; rounding alone moves one."""


def to_srgb(picture: Image.Image, profile: bytes | None) -> tuple[Image.Image, str | None]:
    """An RGB picture in sRGB, and what was done, in words; None where nothing was.

    A profile that is damaged, or of another colour space than the picture, is not used. CMYK without a usable
    profile has no defined colours; it becomes (1 - ink) (1 - black).

    Args:
        picture: of mode L, RGB or CMYK.
        profile: an ICC profile as it lies in the file.
    """
    assert picture.mode in SPACES, picture.mode
    change, note = _change(profile, picture.mode) if profile else (None, None)
    if change is not None:
        # A gray picture may carry an RGB profile: the three channels are then equal.
        changed = ImageCms.applyTransform(picture.convert(change.input_mode), change)
        assert changed is not None  # None is for changes in place
        return changed, note
    if picture.mode == "CMYK":
        plain = "CMYK without a colour profile: converted as (1 - ink) (1 - black)"
        note = f"{note}; {plain}" if note else plain
    return (picture if picture.mode == "RGB" else picture.convert("RGB")), note


@lru_cache(maxsize=8)  # the pictures of a data set share a few profiles
def _change(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str | None]:
    """From a profile to sRGB, and a note; None where the profile is sRGB, or is not to be used."""
    try:
        theirs = ImageCms.ImageCmsProfile(BytesIO(profile))
        space = theirs.profile.xcolor_space.strip()
        if space not in (SPACES[mode], "RGB" if mode == "L" else SPACES[mode]):
            return None, f"its colour profile is for {space}, the picture is {SPACES[mode]}: not used"
        given = "RGB" if space == "RGB" else mode
        srgb = ImageCms.createProfile("sRGB")
        change = ImageCms.buildTransform(theirs, srgb, given, "RGB", ImageCms.Intent.PERCEPTUAL)
        name = ImageCms.getProfileDescription(theirs).strip() or "without a name"
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        return None, f"its colour profile is damaged ({error}): not used"
    if given != "CMYK" and _moves(change) <= SAME:
        return None, None
    return change, f"colours converted to sRGB from the profile {name}"


def _moves(change: ImageCms.ImageCmsTransform) -> int:
    """By how many levels a change moves a colour at most, over a grid of the colours."""
    levels = np.arange(0, 256, 5 if change.input_mode == "L" else 17, dtype=np.uint8)
    if change.input_mode == "L":
        grid = Image.fromarray(levels[None])
    else:
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1)
        grid = Image.fromarray(colours.reshape(len(levels), -1, 3))
    changed = ImageCms.applyTransform(grid, change)
    assert changed is not None
    before = np.asarray(grid.convert("RGB"), dtype=np.int16)
    return int(np.abs(np.asarray(changed, dtype=np.int16) - before).max())
