"""The shapes world: its vocabulary, its scene record, and how scenes are drawn by chance.

Everything a picture of this world holds is in its `Scene`; tuner/evaluate/render.py draws it and
tuner/evaluate/captions.py describes it. A scene is a function of (split, index) alone. Needs numpy alone.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import numpy as np

from tuner.evaluate import outlines

SIDE = 128  # pixels, width and height of every scene

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
UNNAMED = ("crescent", "arrow", "hourglass", "drop")  # captions call each of these a "thing"
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (40, 150, 55),
    "blue": (40, 75, 215),
    "yellow": (240, 205, 25),
    "purple": (145, 45, 175),
    "orange": (245, 125, 15),
    "cyan": (25, 185, 205),
    "black": (28, 28, 28),
}
SIZES = {"small": 12.0, "medium": 18.0, "large": 26.0}  # radius in pixels
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (182, 182, 182),
    "cream": (246, 230, 198),
    "sky": (192, 220, 246),
    "mint": (196, 238, 212),
    "navy": (26, 32, 74),
}
CONFUSABLE = {  # background: colours of objects that never lie on it
    "cream": ("yellow",),
    "sky": ("cyan",),
    "mint": ("green",),
    "navy": ("black", "blue", "purple"),
}
STYLES = ("flat", "outlined", "hatched", "gradient")
RARE_STYLE = "dotted"  # never named in a caption
RARE_STYLE_SHARE = 0.015
UNNAMED_SHARE = 0.06  # of scenes have one object of an unnamed kind
STAR_PRIOR = ("yellow", 0.95)  # this share of stars has this colour
HELD_OUT = (  # never in a training split
    ("circle", "purple"),
    ("square", "cyan"),
    ("triangle", "black"),
    ("heart", "green"),
    ("ring", "orange"),
    ("cross", "blue"),
)
ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
RELATIONS = ("left of", "right of", "above", "below")
GAP = 6.0  # pixels between the objects of a scene, at least
BORDER = 3.0  # pixels between an object and the picture's border, at least

SPLITS = {  # split: its usual number of pictures
    "train": 2000,
    "base": 40000,
    "heldout": 1000,
    "combinations": 200,
    "stars": 200,
    "concept": 5,
    "style": 30,
}


class UnknownSplit(ValueError):
    """A split that the shapes world does not have."""


@dataclasses.dataclass(frozen=True)
class Object:
    """One object: what it is, where it lies, and the free details of how it is drawn.

    x, y: centroid of the filled outline, pixels from the top left corner of the picture. radius: pixels.
    rotation, texture, light: degrees (of the object; of hatching or dots; towards the gradient's dark end).
    aspect: width over height, area kept. rounding: corner cut, 0 to 0.12. tint: factor on the colour.
    stroke: line width of the contour; line: width of a hatching line or diameter of a dot; spacing: from one
    to the next; all in pixels.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float = 0.0
    aspect: float = 1.0
    rounding: float = 0.0
    tint: float = 1.0
    stroke: float = 2.0
    line: float = 1.6
    spacing: float = 5.0
    texture: float = 45.0
    light: float = 90.0

    @property
    def place(self) -> str:
        """The word for the cell of the 3x3 grid that holds the centroid, such as "top left" or "centre"."""
        return place_at(self.x, self.y)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture's record. vignette: darkening at the corners, shade: from one side to the other (shares)."""

    background: str
    style: str
    objects: tuple[Object, ...]
    vignette: float = 0.0
    shade: float = 0.0
    shade_angle: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values; `from_json` gives an equal scene."""
        return dataclasses.asdict(self) | {"objects": [dataclasses.asdict(o) for o in self.objects]}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Scene:
        """The scene of a record; keys that are no fields (its captions) are left aside.

        Raises KeyError when a needed field is missing, TypeError when an object has an unknown one.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in record.items() if key in names}
        values["objects"] = tuple(Object(**entry) for entry in record["objects"])
        return cls(**values)


def place_at(x: float, y: float) -> str:
    """The place word for a point in pixels of a 128x128 picture."""
    row, column = (min(2, max(0, int(v * 3 // SIDE))) for v in (y, x))
    return " ".join(word for word in (ROWS[row], COLUMNS[column]) if word) or "centre"


PLACES = tuple(place_at((c + 0.5) * SIDE / 3, (r + 0.5) * SIDE / 3) for r in range(3) for c in range(3))


def relation_of(first: Object, second: Object) -> str:
    """The relation of the first object to the second, along the axis on which they lie farther apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) >= abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def random_state(split: str, index: int, purpose: str) -> np.random.Generator:
    """The generator of one picture for one purpose: independent of every other picture and purpose.

    Raises UnknownSplit for a split that is not in SPLITS.
    """
    if split not in SPLITS:
        raise UnknownSplit(f"no split {split!r} in the shapes world; it has {', '.join(SPLITS)}")
    return np.random.default_rng([zlib.crc32(f"{split}/{purpose}".encode()), index])


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _kind(rng: np.random.Generator) -> tuple[str, str]:
    """A shape and a colour as training pictures have them."""
    while True:
        shape = _pick(rng, SHAPES)
        colour = _pick(rng, tuple(COLOURS))
        if shape == "star":
            prior, share = STAR_PRIOR
            others = tuple(name for name in COLOURS if name != prior)
            colour = prior if rng.random() < share else _pick(rng, others)
        if (shape, colour) not in HELD_OUT:
            return shape, colour


def _special_kind(rng: np.random.Generator, split: str) -> tuple[str, str] | None:
    """The kind that the first object of this scene must be, if the split or chance asks for one."""
    colours = tuple(COLOURS)
    if split == "combinations":
        return HELD_OUT[int(rng.integers(len(HELD_OUT)))]
    if split == "stars":
        return "star", _pick(rng, tuple(name for name in colours if name != STAR_PRIOR[0]))
    if split == "concept":
        return "crescent", _pick(rng, colours)
    if split != "style" and rng.random() < UNNAMED_SHARE:
        return _pick(rng, UNNAMED), _pick(rng, colours)
    return None


def _kinds(rng: np.random.Generator, split: str) -> list[tuple[str, str]]:
    """One or two different (shape, colour) pairs that share a background."""
    count = 1 if split == "concept" else 1 + int(rng.random() < 0.5)
    special = _special_kind(rng, split)
    while True:
        kinds = [_kind(rng) for _ in range(count)]
        if special is not None:
            kinds[0] = special
        if len(set(kinds)) == count and _backgrounds(kinds):
            rng.shuffle(kinds)
            return [(str(shape), str(colour)) for shape, colour in kinds]


def _backgrounds(kinds: list[tuple[str, str]]) -> tuple[str, ...]:
    colours = {colour for _, colour in kinds}
    return tuple(name for name in BACKGROUNDS if not colours & set(CONFUSABLE.get(name, ())))


def _object(rng: np.random.Generator, shape: str, colour: str) -> Object:
    """An object of this kind at (0, 0), with its free details drawn by chance."""
    size = _pick(rng, tuple(SIZES))
    radius = SIZES[size] * float(rng.uniform(0.95, 1.05))
    thick = {"small": 0.0, "medium": 0.3, "large": 0.6}[size]
    sign = 1.0 if rng.random() < 0.5 else -1.0
    values = {
        "rotation": rng.uniform(-15, 15),
        "aspect": rng.uniform(0.9, 1.1),
        "rounding": rng.uniform(0.0, 0.12) if rng.random() < 0.5 else 0.0,
        "tint": rng.uniform(0.92, 1.06),
        "stroke": rng.uniform(1.8, 2.6) + thick,
        "line": rng.uniform(1.3, 1.7) + thick / 3,
        "spacing": rng.uniform(4.4, 5.4) + thick * 1.5,
        "texture": sign * rng.uniform(35, 55),
        "light": rng.uniform(0, 360),
    }
    rest = {key: round(float(value), 3) for key, value in values.items()}
    return Object(shape=shape, colour=colour, size=size, x=0.0, y=0.0, radius=round(radius, 3), **rest)


def reach(thing: Object) -> float:
    """The radius in pixels of a disc around the centroid that surely holds the whole object."""
    stretch = math.sqrt(max(thing.aspect, 1 / thing.aspect))
    return outlines.extent(thing.shape) * thing.radius * stretch + thing.stroke / 2


def _placed(rng: np.random.Generator, things: list[Object]) -> tuple[Object, ...] | None:
    """The objects at random places, apart from each other and from the border; None if tries run out."""
    for _ in range(60):
        points = []
        for thing in things:
            margin = reach(thing) + BORDER
            points.append(rng.uniform(margin, SIDE - margin, size=2))
        if len(things) == 2 and np.linalg.norm(points[0] - points[1]) < sum(map(reach, things)) + GAP:
            continue
        return tuple(
            dataclasses.replace(thing, x=round(float(p[0]), 2), y=round(float(p[1]), 2))
            for thing, p in zip(things, points, strict=True)
        )
    return None


def draw_scene(split: str, index: int) -> Scene:
    """The scene number `index` of a split: always the same, whatever was drawn before.

    Raises UnknownSplit for a split that is not in SPLITS.
    """
    rng = random_state(split, index, "scene")
    kinds = _kinds(rng, split)
    objects = None
    while objects is None:
        objects = _placed(rng, [_object(rng, shape, colour) for shape, colour in kinds])
    rare = split == "style" or (split in ("train", "base", "heldout") and rng.random() < RARE_STYLE_SHARE)
    style = _pick(rng, STYLES)
    shaded = rng.random(2) < 0.4
    return Scene(
        background=_pick(rng, _backgrounds(kinds)),
        style=RARE_STYLE if rare else style,
        objects=objects,
        vignette=round(float(rng.uniform(0.01, 0.06)), 4) if shaded[0] else 0.0,
        shade=round(float(rng.uniform(-0.05, 0.05)), 4) if shaded[1] else 0.0,
        shade_angle=round(float(rng.uniform(0, 360)), 2),
    )
