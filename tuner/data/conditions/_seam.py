"""What the kinds of conditions share: pictures, counted draws, parameters that may be drawn from a range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from tuner import counted
from tuner.block import Block, Conflict

Picture = npt.NDArray[np.uint8]

# A number, or two between which it is drawn for each sample. Not strict: YAML has lists only.
Amount = float | Annotated[tuple[float, float], Field(strict=False)]


class Draw(NamedTuple):
    """Whose random numbers are drawn: a sample at its position in an epoch."""

    seed: int = 0
    epoch: int = 0
    position: int = 0

    def number(self, value: float | tuple[float, float], key: str) -> float:
        """A parameter's value: itself, or drawn evenly from [low, high) as (seed, epoch, position) says.

        Args:
            value: a number, or the two ends of a range.
            key: the parameter's name; each has draws of its own.
        """
        if isinstance(value, (int, float)):
            return float(value)
        low, high = value
        share = counted.uniform(*self, purpose=f"condition {key}")
        return low + (high - low) * share

    def generator(self, key: str) -> np.random.Generator:
        """Many random numbers for one parameter."""
        return counted.generator(*self, purpose=f"condition {key}")


class Kind(Block):
    """The parameters of a kind; the subclass in each file is called Config.

    A key that several kinds have has the same annotation in all of them: a recipe's block joins them.
    """

    ABOVE: ClassVar[float] = 0
    """What every Amount of the kind is above."""

    def conflicts(self) -> Iterator[Conflict]:
        """Amounts that are too small, and ranges that are written the wrong way round."""
        for key, field in type(self).model_fields.items():
            if field.annotation != Amount:
                continue
            first, last = ends(getattr(self, key))
            if min(first, last) <= self.ABOVE:
                found = f"found the number {min(first, last):g}"
                yield Conflict((key,), f"{found}, expected a number above {self.ABOVE:g}")
            elif first > last:
                found = f"found {first:g} before {last:g}"
                yield Conflict((key,), f"{found}, expected the lower end of the range first")


def ends(value: float | tuple[float, float]) -> tuple[float, float]:
    """The two ends of what a parameter's value is drawn from, which are equal where it is fixed."""
    return (float(value), float(value)) if isinstance(value, (int, float)) else (value[0], value[1])


def three(grey: npt.NDArray[np.uint8]) -> Picture:
    """uint8 [H, W] -> three equal channels, uint8 [H, W, 3]."""
    return np.repeat(grey[:, :, None], 3, axis=2)
