"""The table of users' mistakes: what each is, how it is made in a fresh folder, what has to be told of it.

Loaded by test_bad_input.py as a package of its own, with the files beside it as its parts, one an area.
"""

from __future__ import annotations

from .bases import BASES
from .case import LONGEST, Case, World
from .data import DATA
from .environment import ENVIRONMENT
from .pictures import PICTURES
from .recipes import RECIPES
from .tokens import TOKENS

__all__ = ["AREAS", "CASES", "LONGEST", "Case", "World"]

AREAS: dict[str, list[Case]] = {
    "recipe": RECIPES,
    "base": BASES,
    "data": DATA,
    "pictures": PICTURES,
    "tokens": TOKENS,
    "environment": ENVIRONMENT,
}
CASES = [(area, case) for area, cases in AREAS.items() for case in cases]
