"""Amounts of memory as users write them."""

from __future__ import annotations

import math
import re

from tuner.errors import UserError

UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z]*)\s*")


def parse(text: str) -> int:
    """Bytes of an amount such as `12GiB` (2^30 each), `12GB` (10^9 each) or `8000MiB`.

    Raises:
        UserError: it is no amount, has no unit or an unknown one, or is nothing.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"memory: found {text!r}, expected a number and a unit, such as 12GiB or 12GB")
    unit = found["unit"].lower()
    if unit not in UNITS:
        said = f"the unit {found['unit']}" if unit else "no unit"
        near = {"g": "GiB or GB", "m": "MiB or MB", "k": "KiB or kB", "t": "TiB or TB"}.get(unit, "GiB or GB")
        raise UserError(f"memory: found {said} in {text!r}, expected {near}, such as {found['number']}GiB")
    size = math.floor(float(found["number"]) * UNITS[unit])
    if size < 1:
        raise UserError(f"memory: found {text!r}, expected more than nothing")
    return size


def show(size: int) -> str:
    """Bytes in words: `11.2 GiB`, below one GiB `640 MiB`."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"
