"""Draws the splits of the shapes world: pictures, captions and scene records.

    python datasets/shapes/prepare.py              the splits that the recipes use (train and heldout)
    python datasets/shapes/prepare.py base --count 200 --out /some/folder

A folder is whole or absent: it is written beside its place and renamed. What is in it depends on the split
and the number of pictures alone.
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
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tuner.evaluate.captions import captions_of
from tuner.evaluate.render import render
from tuner.evaluate.world import SPLITS, draw_scene

USUAL = ("train", "heldout")
CHUNK = 100  # pictures a process draws at a time


def draw(folder: Path, split: str, start: int, stop: int) -> list[str]:
    """Write the pictures start..stop-1 of a split into `folder`; return their lines of metadata.jsonl.

    Raises OSError when a picture cannot be written.
    """
    cv2.setNumThreads(1)
    lines = []
    for index in range(start, stop):
        scene = draw_scene(split, index)
        captions = captions_of(scene, split, index)
        name = f"{index:06d}.png"
        if not cv2.imwrite(str(folder / name), cv2.cvtColor(render(scene), cv2.COLOR_RGB2BGR)):
            raise OSError(f"cannot write {folder / name}")
        named = [{"form": caption.form, "named": caption.named.to_json()} for caption in captions]
        record = {**scene.to_json(), "captions": named}  # captions[i] tells what text[i] names
        line = {"file_name": name, "text": [caption.text for caption in captions], "scene": record}
        lines.append(json.dumps(line, separators=(",", ":")))
    return lines


def prepare(split: str, count: int, out: Path, processes: int) -> None:
    """Draw `count` pictures of a split into the folder `out`, which appears whole and replaces an old one."""
    partial_folder = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial_folder.mkdir(parents=True)
    starts = range(0, count, CHUNK)
    stops = [min(start + CHUNK, count) for start in starts]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        lines: list[str] = []
        context = get_context("spawn")
        with Progress(*columns) as progress, ProcessPoolExecutor(processes, mp_context=context) as pool:
            task = progress.add_task(f"shapes/{split}", total=count)
            for some in pool.map(partial(draw, partial_folder, split), starts, stops):
                lines += some
                progress.advance(task, len(some))
        with open(partial_folder / "metadata.jsonl", "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if out.exists():
            shutil.rmtree(out)
        partial_folder.rename(out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def positive(text: str) -> int:
    """A whole number of at least 1. Raises ValueError otherwise."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main() -> None:
    """Read the command line and draw what it asks for."""
    parser = argparse.ArgumentParser(description="Draw splits of the shapes world.")
    parser.add_argument("split", nargs="*", help=f"any of {', '.join(SPLITS)} (default: {' '.join(USUAL)})")
    parser.add_argument("--count", type=positive, help="pictures, instead of the usual number of the split")
    parser.add_argument("--out", type=Path, help="folder for the one split (default: datasets/shapes/SPLIT)")
    parser.add_argument("--processes", type=positive, default=usable_cores())
    arguments = parser.parse_args()
    splits = arguments.split or list(USUAL)
    for split in splits:
        if split not in SPLITS:
            parser.error(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if arguments.out is not None and len(splits) != 1:
        parser.error("--out needs exactly one split")
    for split in splits:
        out = arguments.out or Path(__file__).resolve().parent / split
        prepare(split, arguments.count or SPLITS[split], out, arguments.processes)
        print(f"{split}: {arguments.count or SPLITS[split]} pictures in {os.path.relpath(out)}")


if __name__ == "__main__":
    main()
