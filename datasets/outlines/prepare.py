"""Draws an imagefolder with conditions and masks: pictures of the shapes world with their objects' outlines.

    python datasets/outlines/prepare.py              train and heldout
    python datasets/outlines/prepare.py train --count 50 --out /some/folder

A folder is whole or absent: it is written beside its place and renamed.
"""

# ruff: noqa: E402 -- the path must be right before the project's own modules are imported
from __future__ import annotations

import os
import sys

# Works from a fresh clone, installed or not: the repository's root is searched first, this folder never.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(os.path.dirname(_HERE)), *(p for p in sys.path if os.path.abspath(p) != _HERE)]

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from tuner.evaluate.captions import captions_of
from tuner.evaluate.render import contours, render
from tuner.evaluate.world import SIDE, Scene, draw_scene
from tuner.export.files import folder_whole

COUNTS = {"train": 200, "heldout": 20}
SHIFT = 4  # fractional bits of the points given to OpenCV
Picture = npt.NDArray[np.uint8]


def drawn(scene: Scene, fill: bool) -> Picture:
    """The objects of a scene in white on black, filled or as lines of two pixels; uint8 [128, 128]."""
    picture = np.zeros((SIDE, SIDE), np.uint8)
    for thing in scene.objects:
        # OpenCV counts from the centre of the first pixel.
        lines = [np.round((points - 0.5) * (1 << SHIFT)).astype(np.int32) for points in contours(thing)]
        if fill:
            cv2.fillPoly(picture, lines, 255, cv2.LINE_AA, SHIFT)
        else:
            cv2.polylines(picture, lines, True, 255, 2, cv2.LINE_AA, SHIFT)
    return picture


def prepare(split: str, count: int, out: Path) -> None:
    """Draw `count` pictures of a split into the folder `out`, which replaces an old one.

    Raises OSError when a picture cannot be written.
    """
    with folder_whole(out) as folder:
        lines = []
        for index in range(count):
            scene, name = draw_scene(split, index), f"{index:06d}.png"
            looks = {
                "images": cv2.cvtColor(render(scene), cv2.COLOR_RGB2BGR),
                "conditions": drawn(scene, fill=False),
                "masks": drawn(scene, fill=True),
            }
            for kind, picture in looks.items():
                (folder / kind).mkdir(exist_ok=True)
                if not cv2.imwrite(str(folder / kind / name), picture):
                    raise OSError(f"cannot write {folder / kind / name}")
            line = {
                "file_name": f"images/{name}",
                "text": [caption.text for caption in captions_of(scene, split, index)],
                "conditioning_image": f"conditions/{name}",
                "mask": f"masks/{name}",
            }
            lines.append(json.dumps(line))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def positive(text: str) -> int:
    """A whole number of at least 1. Raises ValueError otherwise."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main() -> None:
    """Read the command line and draw what it asks for."""
    parser = argparse.ArgumentParser(description="Draw an imagefolder with conditions and masks.")
    parser.add_argument("split", nargs="*", help=f"any of {', '.join(COUNTS)} (default: all)")
    parser.add_argument("--count", type=positive, help="pictures, instead of the usual number of the split")
    parser.add_argument("--out", type=Path, help="folder for the one split (default: beside this file)")
    arguments = parser.parse_args()
    splits = arguments.split or list(COUNTS)
    for split in splits:
        if split not in COUNTS:
            parser.error(f"no split {split!r}; there are {', '.join(COUNTS)}")
    if arguments.out is not None and len(splits) != 1:
        parser.error("--out needs exactly one split")
    for split in splits:
        out = arguments.out or Path(__file__).resolve().parent / split
        prepare(split, arguments.count or COUNTS[split], out)
        print(f"{split}: {arguments.count or COUNTS[split]} pictures in {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
