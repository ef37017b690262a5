"""Random numbers as a function of (seed, epoch, position, purpose), never of what was drawn before.

So a sample's noise, timestep or crop does not depend on workers, on how processes interleave, or on a resume.

The bits come from Philox 4x64 (Salmon et al., SC'11) under a 128-bit key hashed from the tuple. numpy's
compatibility policy (NEP 19) keeps the stream of a bit generator fixed, but not that of the methods of
`Generator`; so `uniform`, `choice` and `permutation` use raw bits and integer arithmetic, and only `normal`
relies on a method (`standard_normal`). Golden values in the tests guard all of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Part of every key: raise the number when the meaning of a draw changes, as every run changes with it.
_DOMAIN = b"tuner.counted.1"


def generator(seed: int, *counters: int, purpose: str) -> np.random.Generator:
    """A fresh generator that is a function of the arguments. `seed` and `counters` are any whole numbers."""
    return np.random.Generator(_bits(seed, *counters, purpose=purpose))


def normal(shape: Sequence[int], seed: int, epoch: int, position: int, purpose: str) -> NDArray[np.float32]:
    """Standard normal numbers of `shape`, float32 (drawn in float64 and rounded)."""
    drawn = generator(seed, epoch, position, purpose=purpose).standard_normal(tuple(shape))
    return drawn.astype(np.float32)


def uniform(seed: int, epoch: int, position: int, purpose: str) -> float:
    """A number evenly in [0, 1): a multiple of 2^-24, so that it stays below 1 when rounded to float32."""
    return (_raw(seed, epoch, position, purpose=purpose) >> 40) * 2.0**-24


def choice(options: int | Sequence[float], seed: int, epoch: int, position: int, purpose: str) -> int:
    """An index: evenly in [0, options), or by weights (not negative, not all 0, of any sum).

    Raises:
        ValueError: for no options, or weights that are negative, not finite, or all 0.
    """
    bits = _raw(seed, epoch, position, purpose=purpose)
    if isinstance(options, int):
        if options < 1:
            raise ValueError(f"a choice needs at least one option, found {options}")
        return (bits * options) >> 64  # unbiased to options / 2^64
    weights = np.asarray(options, dtype=np.float64)
    if weights.ndim != 1 or not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"weights must be finite, not negative and not all 0, found {list(options)}")
    edges = np.cumsum(weights)
    # side="right" never picks a weight of 0. The product reaches the last edge only by rounding up, where
    # the sum is subnormal: then it is the last positive weight.
    index = int(np.searchsorted(edges, (bits >> 11) * 2.0**-53 * edges[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


def permutation(n: int, seed: int, epoch: int, purpose: str = "order") -> NDArray[np.int64]:
    """The numbers 0 to n - 1 in random order, int64 [n].

    Sorts n random 64-bit keys; two equal keys (probability below n^2 / 2^65) stay in order.
    """
    keys = _bits(seed, epoch, purpose=purpose).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64)


def seed_libraries(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seeds the global generators of torch (CPU and every GPU), numpy and random.

    For what draws from them inside libraries (dropout in adapters). Called before each forward, it makes a
    resume exact; over another number of processes it is equal in distribution only.
    """
    import torch  # here, because everything else in this module needs numpy only

    bits = _raw(seed, step, micro_step, rank, purpose="libraries")
    torch.manual_seed(bits >> 1)  # torch takes 63 bits on every device; also seeds CUDA
    np.random.seed(bits & 0xFFFFFFFF)  # numpy's global generator takes 32 bits
    random.seed(bits)


def _bits(seed: int, *counters: int, purpose: str) -> np.random.Philox:
    # Numbers hold neither comma nor colon, so different tuples are different texts.
    text = ",".join(str(int(number)) for number in (seed, *counters)) + ":" + purpose
    digest = hashlib.blake2b(text.encode(), digest_size=16, person=_DOMAIN).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def _raw(seed: int, *counters: int, purpose: str) -> int:
    """64 random bits as a Python integer."""
    return int(_bits(seed, *counters, purpose=purpose).random_raw())
