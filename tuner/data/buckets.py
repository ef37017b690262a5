"""Aspect-ratio buckets: the heights and widths that pictures are trained at, and which picture has which."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tuner.data.transform import Transform
from tuner.errors import UserError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
NAMED = 20
"""How many files an error lists before it only counts."""


class Bucket(NamedTuple):
    """A height and a width that pictures are trained at, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        """As users write it: width first."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Assigned:
    """Which sample is trained on in which buckets, one row for each time that it comes.

    Attributes:
        shapes: the buckets that have samples, from the smallest area, the tallest first.
        sample, bucket: int64 [R], the sample's index and the bucket's in `shapes`.
        crop_loss: float32 [R], the share of the picture that is cut away.
        scale: float32 [R], how much the picture's sides are enlarged (above 1) or made smaller.
    """

    shapes: tuple[Bucket, ...]
    sample: Ints
    bucket: Ints
    crop_loss: Floats
    scale: Floats

    @staticmethod
    def join(parts: Sequence[tuple[Assigned, int]]) -> Assigned:
        """Several sources' as one.

        Args:
            parts: each source's with its number of samples, in the order in which the samples are joined.
        """
        shapes = _sorted({shape for part, _ in parts for shape in part.shapes})
        number = {shape: index for index, shape in enumerate(shapes)}
        firsts = np.cumsum([0] + [samples for _, samples in parts])
        buckets = [np.array([number[s] for s in part.shapes], np.int64)[part.bucket] for part, _ in parts]
        return Assigned(
            shapes,
            np.concatenate([part.sample + first for (part, _), first in zip(parts, firsts, strict=False)]),
            np.concatenate(buckets),
            np.concatenate([part.crop_loss for part, _ in parts]),
            np.concatenate([part.scale for part, _ in parts]),
        )


def together(parts: Sequence[Assigned]) -> Assigned:
    """The same samples' buckets of several plans as one, each sample in each of its buckets once."""
    if len(parts) == 1:
        return parts[0]
    shapes = _sorted({shape for part in parts for shape in part.shapes})
    number = {shape: index for index, shape in enumerate(shapes)}
    sample = np.concatenate([part.sample for part in parts])
    bucket = np.concatenate([np.array([number[s] for s in p.shapes], np.int64)[p.bucket] for p in parts])
    rows = np.unique(sample * max(len(shapes), 1) + bucket, return_index=True)[1]
    loss, scale = (np.concatenate([getattr(p, key) for p in parts]) for key in ("crop_loss", "scale"))
    return Assigned(shapes, sample[rows], bucket[rows], loss[rows], scale[rows])


class Buckets:
    """The buckets about one area or several.

    About the area of a square lie all shapes whose sides are multiples of the step, whose area is at most
    the square's, whose shorter side cannot be a step longer, and whose aspect is at most the longest; so no
    bucket takes more memory than the square. A picture has the bucket of the nearest aspect, in logarithms,
    so that 2:1 is as far from the square as 1:2.

    With several areas a picture comes once in an epoch at each of them: an epoch is as many times as long.
    (To draw one area for each picture would make epochs of different lengths.) Where pictures are not
    enlarged, one that does not cover its bucket has that of an area a step smaller, and so on; where it would
    come to the same bucket from two areas, it is there once.
    """

    def __init__(
        self, sides: Sequence[int], step: int, longest: float = 1.0, upscale: bool = True, latent: int = 1
    ) -> None:
        """
        Args:
            sides: of the square that has the area, in pixels, for each area.
            step: every height and width is a multiple of it, in pixels.
            longest: the longer side divided by the shorter, at most; 1: squares only.
            upscale: pictures that are smaller than their bucket are enlarged.
            latent: the family's own step, in pixels, which has to divide `step`.

        Raises:
            UserError: no such buckets.
        """
        problems = []
        if step < 1 or step % latent:
            near = max(latent, round(step / latent) * latent)
            wanted = f"a multiple of {latent}, such as {near}"
            problems.append(f"data.buckets.step: found {step}, expected {wanted}")
        if longest < 1:
            problems.append(f"data.buckets.longest: found {longest:g}, expected 1 (squares only) or more")
        if len(set(sides)) != len(sides) or not sides:
            problems.append(f"data.resolution: found {list(sides)}, expected different numbers")
        for side in sides if not problems else ():
            if side < step or side % step:
                below = side // step * step
                choices = " or ".join(str(choice) for choice in (below, below + step) if choice)
                problems.append(
                    f"data.resolution: {side} is no multiple of {step}, the buckets' step; choose {choices}"
                )
        if problems:
            raise UserError("\n".join(problems))
        self.sides, self.step, self.longest, self.upscale = tuple(sides), step, longest, upscale
        self._tables = {side: _Table(side, step, longest) for side in sides}

    @property
    def shapes(self) -> tuple[Bucket, ...]:
        """All buckets about the areas, but the smaller ones of pictures that are not enlarged."""
        return _sorted({shape for side in self.sides for shape in self._tables[side].shapes})

    def of(self, height: int, width: int, side: int | None = None) -> Bucket:
        """The bucket of a picture of [H, W].

        Args:
            height, width: the picture's, in pixels.
            side: of which area; the first if not given.

        Raises:
            UserError: the picture is smaller than every bucket and is not to be enlarged.
        """
        side = self.sides[0] if side is None else side
        bucket = self._table(side).of(height, width)
        while not self.upscale and (bucket.height > height or bucket.width > width):
            side -= self.step
            if side < self.step:
                raise UserError(
                    f"{width}x{height} pixels, smaller than the smallest bucket {self.step}x{self.step}, and "
                    "data.buckets.upscale is false"
                )
            bucket = self._table(side).of(height, width)
        return bucket

    def every(self, height: int, width: int) -> tuple[Bucket, ...]:
        """The buckets of a picture of [H, W], of each area one, the same never twice; raises as of()."""
        return tuple(dict.fromkeys(self.of(height, width, side) for side in self.sides))

    def assign(self, sizes: npt.ArrayLike, name: Callable[[int], str]) -> Assigned:
        """The buckets of all samples.

        Args:
            sizes: whole numbers [N, 2], each picture's height and width, turned as its EXIF says.
            name: what a message calls the sample of an index.

        Raises:
            UserError: pictures that have no bucket, each with its name.
        """
        unique, which = np.unique(np.asarray(sizes, np.int64).reshape(-1, 2), axis=0, return_inverse=True)
        which = which.reshape(-1)
        found: list[tuple[Bucket, float, float]] = []  # for each size one after another, of each area
        counts, wrong = np.zeros(len(unique), np.int64), {}
        for index, (height, width) in enumerate(unique.tolist()):
            try:
                buckets = self.every(height, width)
            except UserError as error:
                wrong[index] = str(error)
                continue
            counts[index] = len(buckets)
            looks = [Transform(*bucket) for bucket in buckets]
            found += [
                (bucket, look.crop_loss(height, width), look.scale(height, width))
                for bucket, look in zip(buckets, looks, strict=True)
            ]
        if wrong:
            of = enumerate(which.tolist())
            raise UserError(_listed([(name(index), wrong[size]) for index, size in of if size in wrong]))
        shapes = _sorted({bucket for bucket, _, _ in found})
        number = {shape: index for index, shape in enumerate(shapes)}
        sample = np.repeat(np.arange(len(which)), counts[which])
        nth = np.arange(len(sample)) - np.repeat(_before(counts[which]), counts[which])
        at = _before(counts)[which[sample]] + nth
        return Assigned(
            shapes,
            sample,
            np.array([number[bucket] for bucket, _, _ in found], np.int64)[at],
            np.array([loss for _, loss, _ in found], np.float32)[at],
            np.array([scale for _, _, scale in found], np.float32)[at],
        )

    def _table(self, side: int) -> _Table:
        if side not in self._tables:
            self._tables[side] = _Table(side, self.step, self.longest)
        return self._tables[side]


class _Table:
    """The buckets about one area, from the tallest to the widest."""

    def __init__(self, side: int, step: int, longest: float) -> None:
        wide = []
        long, short = side, side
        while short and long <= longest * short:
            wide.append(Bucket(short, long))
            long += step
            short = side * side // long // step * step
        tall = [Bucket(bucket.width, bucket.height) for bucket in wide[:0:-1]]
        self.shapes = (*tall, *wide)
        # A picture lies before the middle of two neighbours' log aspects where its squared aspect is at most
        # their aspects' product. Compared in whole numbers, so that all machines agree on ties.
        self._middles = [(a.width * b.width, a.height * b.height) for a, b in pairwise(self.shapes)]

    def of(self, height: int, width: int) -> Bucket:
        """The bucket of the nearest log aspect; of two equally near the taller."""
        assert height >= 1 and width >= 1

        def before(middle: tuple[int, int]) -> bool:
            return width * width * middle[1] <= height * height * middle[0]

        return self.shapes[bisect_left(self._middles, True, key=before)]


class Row(NamedTuple):
    """A bucket in numbers.

    Attributes:
        samples: how many are in it.
        entries: how many of its pictures come in an epoch, repeats counted.
        batches: optimiser steps of an epoch.
        last: pictures in the last of them.
        crop_loss: the mean share of its samples' pictures that is cut away.
        enlarged: how many samples are smaller than the bucket.
    """

    bucket: Bucket
    samples: int
    entries: int
    batches: int
    last: int
    crop_loss: float
    enlarged: int


def rows(assigned: Assigned, entries: Ints, batch_size: int) -> list[Row]:
    """The table of buckets, in numbers.

    Args:
        assigned: all samples'.
        entries: [buckets], how many of each come in an epoch (Plan.sizes).
        batch_size: how many of them are in one batch (Plan.own).
    """
    count = len(assigned.shapes)
    samples = np.bincount(assigned.bucket, minlength=count)
    loss = np.bincount(assigned.bucket, assigned.crop_loss, count) / np.maximum(samples, 1)
    enlarged = np.bincount(assigned.bucket[assigned.scale > 1], minlength=count)
    batches = -(-entries // batch_size)
    last = entries - np.maximum(batches - 1, 0) * batch_size
    columns = (samples, entries, batches, last, loss, enlarged)
    return [Row(*row) for row in zip(assigned.shapes, *(c.tolist() for c in columns), strict=True)]


def lines(table: Sequence[Row]) -> list[str]:
    """The table as text, a heading first."""
    heading = ["bucket", "samples", "an epoch", "batches", "last", "crop loss", "enlarged"]
    cells = [heading]
    for row in table:
        bucket, *numbers, loss, enlarged = row
        cells.append([str(bucket), *map(str, numbers), f"{loss:.1%}", str(enlarged)])
    wide = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    return ["  ".join(cell.rjust(n) for cell, n in zip(line, wide, strict=True)) for line in cells]


def warnings(assigned: Assigned, name: Callable[[int], str]) -> list[str]:
    """A line on the pictures that are enlarged, with the one that is most; none where there is none."""
    above = assigned.scale > 1
    if not above.any():
        return []
    most = int(np.argmax(assigned.scale))
    samples = len(np.unique(assigned.sample))
    return [
        f"{len(np.unique(assigned.sample[above]))} of {samples} pictures are enlarged, the most "
        f"{assigned.scale[most]:.3g} times, to {assigned.shapes[assigned.bucket[most]]}: "
        f"{name(int(assigned.sample[most]))}"
    ]


def _sorted(shapes: set[Bucket]) -> tuple[Bucket, ...]:
    return tuple(sorted(shapes, key=lambda shape: (shape.height * shape.width, -shape.height)))


def _before(counts: Ints) -> Ints:
    """How many there are before each."""
    return np.cumsum(counts) - counts


def _listed(problems: Sequence[tuple[str, str]]) -> str:
    told = [f"{name}: {problem}" for name, problem in problems[:NAMED]]
    more = len(problems) - NAMED
    return "\n".join([*told, f"and {more} more"] if more > 0 else told)
