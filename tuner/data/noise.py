"""A sample's noise and the number its timestep comes from, as functions of (seed, epoch, position)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tuner import counted

Array = NDArray[np.float32]
GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, to the nearest odd number."""


@dataclass(frozen=True)
class Draws:
    """How noise and timesteps are drawn; the names are the recipe's keys.

    Attributes:
        timestep_draw: even: the numbers of consecutive samples lie evenly between 0 and 1.
        offset_noise: standard deviation of a number added to a whole channel of the noise.
        pyramid_noise: weight of noise of half the resolution, its square for a quarter, and so on; 0: none.
        pyramid_levels: how many halvings at most.
        input_perturbation: standard deviation of what is added to the input's noise but not to the target's.
    """

    timestep_draw: Literal["independent", "even"] = "independent"
    offset_noise: float = 0.0
    pyramid_noise: float = 0.0
    pyramid_levels: int = 6
    input_perturbation: float = 0.0

    def u(self, seed: int, epoch: int, position: int) -> float:
        """The timestep's number in [0, 1), a multiple of 2^-24.

        Even ones are (offset + position / golden ratio) mod 1 with an offset drawn for (seed, epoch): of any
        consecutive positions the largest gap is at most 2.62 times the smallest, and each alone is uniform.
        """
        if self.timestep_draw == "independent":
            return counted.uniform(seed, epoch, position, "timestep")
        # Whole numbers of 2^-64, so that nothing is lost at large positions and all machines agree.
        offset = int(counted.uniform(seed, epoch, 0, "timestep offset") * 2**24) << 40
        return ((offset + position * GOLDEN) % 2**64 >> 40) * 2.0**-24

    def noise(self, shape: tuple[int, int, int], seed: int, epoch: int, position: int) -> Array:
        """The noise [C, h, w] that the target is made of; of variance 1 + offset_noise^2 everywhere."""
        noise = counted.normal(shape, seed, epoch, position, "noise")
        if self.pyramid_noise:
            levels = [
                counted.normal((shape[0], *cells), seed, epoch, position, f"pyramid noise {level}")
                for level, cells in enumerate(pyramid(shape[1:], self.pyramid_levels), start=1)
            ]
            noise = summed(noise, levels, self.pyramid_noise)
        if self.offset_noise:
            offset = counted.normal(shape[:1], seed, epoch, position, "offset noise")
            noise = noise + np.float32(self.offset_noise) * offset[:, None, None]
        return noise

    def input_noise(self, noise: Array, seed: int, epoch: int, position: int) -> Array:
        """The noise of the input, where that of the target is `noise` (arXiv 2301.11706, algorithm 1)."""
        change = counted.normal(noise.shape, seed, epoch, position, "input perturbation")
        return noise + np.float32(self.input_perturbation) * change


def pyramid(size: tuple[int, int], levels: int) -> list[tuple[int, int]]:
    """Rows and columns of each level: halved again and again, rounded up; a single cell is the last one."""
    found: list[tuple[int, int]] = []
    while len(found) < levels and size != (1, 1):
        size = (-(-size[0] // 2), -(-size[1] // 2))
        found.append(size)
    return found


def summed(noise: Array, levels: list[Array], discount: float) -> Array:
    """`noise` [C, h, w] plus discount^i times level i [C, h_i, w_i], enlarged bilinearly, i from 1.

    Divided by what makes its variance 1 at every place: enlarging lowers it between cells. (Multi-resolution
    noise as J. Whitaker proposed it in 2023 is divided by the batch's own deviation instead.)
    """
    total = noise.astype(np.float64)
    variance = np.ones(noise.shape[1:])
    for power, level in enumerate(levels, start=1):
        rows, columns = ((level.shape[i], noise.shape[i]) for i in (1, 2))
        total += discount**power * _enlarged(_enlarged(level.astype(np.float64), 1, *rows), 2, *columns)
        variance += discount ** (2 * power) * np.outer(_squares(*rows), _squares(*columns))
    return (total / np.sqrt(variance)).astype(np.float32)


@functools.cache
def _between(cells: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For each of `size` places the two of `cells` cells it lies between, and the second one's share.

    The cells' middles are as in torch's interpolate without align_corners; beyond the outer ones it is flat.
    """
    at = np.maximum((np.arange(size) + 0.5) * cells / size - 0.5, 0.0)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, cells - 1), at - low


def _enlarged(values: NDArray[np.float64], axis: int, cells: int, size: int) -> NDArray[np.float64]:
    low, high, share = _between(cells, size)
    share = share.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    # Element by element, without a matrix product, so that the bits do not depend on a library's order.
    return values.take(low, axis) * (1.0 - share) + values.take(high, axis) * share


def _squares(cells: int, size: int) -> NDArray[np.float64]:
    """The variance at each place of enlarged numbers of variance 1."""
    low, high, share = _between(cells, size)
    return np.where(low == high, 1.0, (1.0 - share) ** 2 + share**2)
