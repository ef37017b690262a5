"""How right a reading is: against a scene's record, or against what a caption names."""

from __future__ import annotations

import itertools
import math

from tuner.evaluate.captions import ATTRIBUTES, THING, Named, NamedObject
from tuner.evaluate.judge import Reading, Seen
from tuner.evaluate.world import COLUMNS, ROWS, SIDE, UNNAMED, Object, Scene

NEAR = 6.0  # pixels between the centroids of a scene's object and the one read, at most
PLACE_MARGIN = 4.0  # pixels that a centroid may lie outside the named cell of the 3x3 grid
RELATION_MARGIN = 4.0  # pixels that two centroids must differ by along the named axis


def _at(thing: Object, seen: Seen | None) -> dict[str, bool]:
    """Each attribute of one object of a scene against one that was read."""
    if seen is None:
        return dict.fromkeys(ATTRIBUTES, False)
    return {
        "shape": seen.shape == thing.shape,
        "colour": seen.colour == thing.colour,
        "size": seen.size == thing.size,
        "place": math.hypot(seen.x - thing.x, seen.y - thing.y) <= NEAR,
    }


def _in_place(seen: Seen, place: str) -> bool:
    """Whether the centroid lies in the cell of a place word, or within PLACE_MARGIN of it."""
    words = place.split()
    cell = SIDE / 3
    for value, names in ((seen.y, ROWS), (seen.x, COLUMNS)):
        index = next((i for i, name in enumerate(names) if name in words), 1)
        if not index * cell - PLACE_MARGIN <= value <= (index + 1) * cell + PLACE_MARGIN:
            return False
    return True


def _as_named(named: NamedObject, seen: Seen | None) -> dict[str, bool]:
    """Each attribute that is named of one object against one that was read."""
    asked = {name: getattr(named, name) for name in ATTRIBUTES if getattr(named, name) is not None}
    if seen is None:
        return dict.fromkeys(asked, False)
    right = {name: getattr(seen, name) == value for name, value in asked.items()}
    if named.shape == THING:
        right["shape"] = seen.shape in UNNAMED
    if named.place is not None:
        right["place"] = _in_place(seen, named.place)
    return right


def _related(relation: str, first: Seen | None, second: Seen | None) -> bool:
    """Whether the first object lies so to the second, by more than RELATION_MARGIN."""
    if first is None or second is None:
        return False
    gaps = {
        "left of": second.x - first.x,
        "right of": first.x - second.x,
        "above": second.y - first.y,
        "below": first.y - second.y,
    }
    return gaps[relation] > RELATION_MARGIN


def _assignments(wanted: int, seen: tuple[Seen, ...]) -> list[tuple[Seen | None, ...]]:
    """Every way to give each of the wanted objects an object of its own, None where there are too few."""
    padded: list[Seen | None] = [*seen, *[None] * max(0, wanted - len(seen))]
    return list(itertools.permutations(padded, wanted))


def _merged(parts: list[dict[str, bool]]) -> dict[str, bool]:
    """An attribute is right when it is right in every part that has it."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {key: all(part[key] for part in parts if key in part) for key in keys}


def compare(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Each attribute of the whole scene: count, shape, colour, size, place, background, style, and all.

    An attribute of objects is right when it is right for every object of the scene, under the assignment that
    makes most attributes of single objects right.
    """
    best = max(
        (
            [_at(*pair) for pair in zip(scene.objects, some, strict=True)]
            for some in _assignments(len(scene.objects), reading.objects)
        ),
        key=lambda parts: sum(sum(part.values()) for part in parts),
    )
    right = {"count": len(reading.objects) == len(scene.objects), **_merged(best)}
    right |= {"background": reading.background == scene.background, "style": reading.style == scene.style}
    return right | {"all": all(right.values())}


def score(reading: Reading, named: Named) -> dict[str, bool]:
    """What a caption names, and nothing else: any of count, shape, colour, size, place, relation, style,
    background; and all of them together.

    count (that there are exactly as many objects as the caption mentions) is asked when the caption mentions
    all objects. A shape named "thing" is any unnamed kind. The assignment is the one that makes most right.
    """

    def parts_of(some: tuple[Seen | None, ...]) -> list[dict[str, bool]]:
        parts = [_as_named(*pair) for pair in zip(named.objects, some, strict=True)]
        if named.relation is not None:
            parts.append({"relation": _related(named.relation, some[0], some[1])})
        return parts

    best = max(
        (parts_of(some) for some in _assignments(len(named.objects), reading.objects)),
        key=lambda parts: sum(sum(part.values()) for part in parts),
    )
    right = {"count": len(reading.objects) == len(named.objects)} if named.whole and named.objects else {}
    right |= _merged(best)
    if named.style is not None:
        right["style"] = reading.style == named.style
    if named.background is not None:
        right["background"] = reading.background == named.background
    return right | {"all": all(right.values())}
