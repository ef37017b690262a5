"""Which columns of a table hold what, by the recipe or by their usual names, and whether they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tuner.data.sources.names import missing_column
from tuner.data.sources.spec import Columns
from tuner.errors import UserError

CAPTION = "text"
USUAL = {
    "picture": "image",
    "caption": CAPTION,
    "condition": "conditioning_image",
    "mask": "mask",
    "weight": "weight",
    "scene": "scene",
}
NEEDED = ("picture", "caption")


@dataclass(frozen=True)
class Chosen:
    """The columns that are used, by what they hold; those that are not there are absent.

    Attributes:
        captions: those with captions, by kind; the empty word where there is one without kinds.
        labels: names of the caption column's numbers, where it holds classes.
    """

    names: dict[str, str]
    captions: dict[str, str]
    labels: tuple[str, ...] = ()

    @property
    def used(self) -> dict[str, str]:
        """Every column that is used, and what it holds."""
        captions = {column: f"caption {kind}".rstrip() for kind, column in self.captions.items()}
        others = {column: key for key, column in self.names.items()}
        return {self.names["picture"]: "picture"} | captions | others

    @property
    def pictures(self) -> list[str]:
        """The columns with pictures in them."""
        return [self.names[key] for key in ("picture", "condition", "mask") if key in self.names]


def choose(columns: Columns, names: Sequence[str], features: Any, place: str) -> Chosen:
    """The columns to use.

    Args:
        names: the columns that there are.
        features: their kinds, as `datasets` gives them; None: unknown.

    Raises:
        UserError: a column that is needed or named is not there, or holds something else; all at once.
    """
    captions = columns.captions(CAPTION)
    found: list[tuple[str, str]] = []
    wrong: list[str] = []
    for key, usual in USUAL.items():
        given = getattr(columns, key)
        for name in captions.values() if key == "caption" else [given or usual]:
            if name in names:
                found.append((key, name))
            elif given or key in NEEDED:
                wrong.append(missing_column(key, name, names))
    labels: tuple[str, ...] = ()
    for key, name in found if features is not None else ():
        kind = features[name]
        if key == "caption" and hasattr(kind, "names") and len(captions) == 1:
            labels = tuple(kind.names)
        elif not _fits(key, kind):
            wrong.append(f"column {name} for columns.{key}: found {kind}, expected {EXPECTED[key]}")
    if wrong:
        raise UserError("\n".join(f"{place}: {one}" for one in wrong))
    return Chosen({key: name for key, name in found if key != "caption"}, captions, labels)


EXPECTED = {
    "picture": "pictures (Image, or their bytes)",
    "condition": "pictures (Image, or their bytes)",
    "mask": "pictures (Image, or their bytes)",
    "caption": "text, lists of texts, records of these by kind, or classes",
    "weight": "numbers",
    "scene": "records, or text with JSON",
}


def _fits(key: str, kind: Any) -> bool:
    dtype = str(getattr(kind, "dtype", ""))
    if key in ("picture", "condition", "mask"):
        whole = isinstance(kind, dict) and "bytes" in kind
        return type(kind).__name__ == "Image" or whole or dtype in ("binary", "large_binary")
    if key == "caption":
        if isinstance(kind, dict):
            return bool(kind) and all(not isinstance(one, dict) and _fits(key, one) for one in kind.values())
        inner = getattr(kind, "feature", None) or (kind[0] if isinstance(kind, list) else kind)
        return str(getattr(inner, "dtype", "")) in ("string", "large_string", "string_view")
    if key == "weight":
        return dtype.startswith(("float", "int", "uint"))
    return isinstance(kind, dict) or dtype in ("string", "large_string", "string_view")
