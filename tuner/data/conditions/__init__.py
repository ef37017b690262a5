"""Condition pictures, one kind a file, found by file name.

Each file has `make(picture: uint8 [H, W, 3]) -> uint8 [H, W, 3]`: it sees the pixels that are trained on,
after the crop, at training resolution; the values 0..255 stand for 0..1.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]


def kinds() -> tuple[str, ...]:
    """The names of the kinds that can be computed."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def maker(kind: str) -> Callable[[Picture], Picture]:
    """The function of a kind; `kind` is one of kinds()."""
    make: Callable[[Picture], Picture] = importlib.import_module(f"{__name__}.{kind}").make
    return make
