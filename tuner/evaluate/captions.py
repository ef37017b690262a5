"""Captions of a scene, each with the machine-readable set of what it names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tuner.evaluate.world import RARE_STYLE, UNNAMED, Object, Scene, random_state, relation_of

THING = "thing"  # the word for every kind in world.UNNAMED
ATTRIBUTES = ("shape", "colour", "size", "place")
MIDDLE = 4  # captions with a random part of the attributes


@dataclasses.dataclass(frozen=True)
class NamedObject:
    """What a caption says of one object; None where it says nothing. shape may be "thing"."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclasses.dataclass(frozen=True)
class Named:
    """What a caption names. relation: of the first object to the second.

    whole: all objects of the scene are mentioned, so that their number is named too.
    """

    objects: tuple[NamedObject, ...] = ()
    relation: str | None = None
    style: str | None = None
    background: str | None = None
    whole: bool = True

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without what is not named."""
        objects = [{k: v for k, v in dataclasses.asdict(o).items() if v is not None} for o in self.objects]
        rest = {key: getattr(self, key) for key in ("relation", "style", "background")}
        return {"objects": objects, **{k: v for k, v in rest.items() if v is not None}, "whole": self.whole}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Named:
        """The inverse of `to_json`. Raises TypeError for an unknown key."""
        objects = tuple(NamedObject(**entry) for entry in record.get("objects", ()))
        return cls(**{**record, "objects": objects})


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption: its text, its form ("short", "long", "middle", "relation" or "alt") and what it names."""

    text: str
    form: str
    named: Named


def _named(thing: Object, attributes: tuple[str, ...]) -> NamedObject:
    values = {name: getattr(thing, name) for name in attributes}
    if values.get("shape") in UNNAMED:
        values["shape"] = THING
    return NamedObject(**values)


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def place_phrase(place: str) -> str:
    """The words for a place: "at the top left", "in the centre", "on the right"."""
    if place == "centre":
        return "in the centre"
    return ("on the " if place in ("left", "right") else "at the ") + place


def noun(named: NamedObject, style: str | None = None) -> str:
    """The object without an article: "hatched small red circle"; "shape" where the shape is not named."""
    words = (style, named.size, named.colour, named.shape or "shape")
    return " ".join(word for word in words if word)


def phrase(named: Named) -> str:
    """The plain sentence for what is named: "a small red circle left of a blue star, hatched, on a ...".

    The words that every prompt of an evaluation uses. At least one object must be named.
    """
    assert named.objects, "a sentence needs an object"
    parts = []
    for one in named.objects:
        where = f" {place_phrase(one.place)}" if one.place else ""
        parts.append(_article(noun(one)) + where)
    text = f" {named.relation or 'and'} ".join(parts)
    if named.style:
        text += f", {named.style}"
    if named.background:
        text += f", on {_article(named.background)} background"
    return text


def _style(scene: Scene) -> str | None:
    return None if scene.style == RARE_STYLE else scene.style


def _order(rng: np.random.Generator, scene: Scene) -> tuple[Object, ...]:
    return scene.objects[::-1] if rng.random() < 0.5 else scene.objects


def short(scene: Scene, rng: np.random.Generator, relation: bool | None = None) -> Caption:
    """Shapes and colours, of two objects also with their relation (by chance unless `relation` is given)."""
    objects = _order(rng, scene)
    related = len(objects) == 2 and (rng.random() < 0.4 if relation is None else relation)
    named = Named(
        objects=tuple(_named(thing, ("shape", "colour")) for thing in objects),
        relation=relation_of(*objects) if related else None,
    )
    return Caption(_opened(rng, phrase(named), 0.35), "relation" if relation else "short", named)


def long(scene: Scene, rng: np.random.Generator) -> Caption:
    """Everything that can be named."""
    objects = _order(rng, scene)
    named = Named(
        objects=tuple(_named(thing, ATTRIBUTES) for thing in objects),
        style=_style(scene),
        background=scene.background,
    )
    return Caption(_opened(rng, phrase(named), 0.2), "long", named)


def middle(scene: Scene, rng: np.random.Generator) -> Caption:
    """A random part of the attributes, the same for both objects more often than not."""
    objects = _order(rng, scene)
    chances = dict(zip(ATTRIBUTES, (0.85, 0.6, 0.35, 0.35), strict=True))
    drawn = tuple(name for name in ATTRIBUTES if rng.random() < chances[name])
    parts = []
    for thing in objects:
        if rng.random() < 0.25:
            drawn = tuple(name for name in ATTRIBUTES if rng.random() < chances[name])
        parts.append(_named(thing, drawn))
    related = len(objects) == 2 and rng.random() < 0.3
    if related:  # places beside a relation would be hard to read
        parts = [dataclasses.replace(part, place=None) for part in parts]
    named = Named(
        objects=tuple(parts),
        relation=relation_of(*objects) if related else None,
        style=_style(scene) if rng.random() < 0.4 else None,
        background=scene.background if rng.random() < 0.4 else None,
    )
    text = phrase(named)
    if named.style and rng.random() < 0.5:  # the style as an adjective instead of at the end
        plain = phrase(dataclasses.replace(named, style=None))
        for one in set(named.objects):
            plain = plain.replace(_article(noun(one)), _article(noun(one, named.style)))
        text = plain
    return Caption(_opened(rng, text, 0.3), "middle", named)


def _opened(rng: np.random.Generator, text: str, share: float) -> str:
    """The text with an opening ("a photo of ..."), or without its first article, in `share` of all cases."""
    draw = rng.random()
    if draw < share:
        openings = ("a picture of", "a photo of", "a drawing of", "an image of")
        return f"{openings[int(rng.integers(len(openings)))]} {text}"
    return text.removeprefix("a ").removeprefix("an ") if draw < share + 0.15 else text


def alt(scene: Scene, rng: np.random.Generator) -> Caption:
    """Noisy text as pages give it beside a picture: file names, odd case, wrong order, parts left out."""
    objects = _order(rng, scene)
    kept = objects[: 1 + int(rng.random() < 0.4)]
    chances = (0.8, 0.7, 0.15)
    parts = tuple(
        _named(thing, tuple(name for name, p in zip(ATTRIBUTES, chances, strict=False) if rng.random() < p))
        for thing in kept
    )
    parts = tuple(part for part in parts if part != NamedObject())
    words = [[w for w in (p.size, p.colour, p.shape) if w] for p in parts]
    for group in words:
        if rng.random() < 0.4:
            rng.shuffle(group)
    number = int(rng.integers(1, 1000))
    flat = [str(word) for group in words for word in group]
    kind = int(rng.integers(6))
    text = {
        0: "-".join([*flat, f"{number}.jpg"]),
        1: "_".join(["img", *flat, f"{number}.png"]),
        2: " ".join(flat).upper() or f"IMG {number}",
        3: " ".join(["stock image", *flat, f"no {number}"]),
        4: ", ".join(" ".join(group) for group in words) or "picture",
        5: " ".join([*flat, "clip art"]).title(),
    }[kind]
    named = Named(objects=parts, whole=False)
    return Caption(text, "alt", named)


def captions_of(scene: Scene, split: str, index: int) -> tuple[Caption, ...]:
    """The captions of picture `index` of a split: short, long, MIDDLE middle ones, a relation, an alt text.

    Always the same for the same arguments. Raises UnknownSplit for a split that is not in world.SPLITS.
    """
    rng = random_state(split, index, "captions")
    found = [short(scene, rng), long(scene, rng)]
    found += [middle(scene, rng) for _ in range(MIDDLE)]
    if len(scene.objects) == 2:
        found.append(short(scene, rng, relation=True))
    if split == "concept":  # a new word takes the place of "thing", so each of its captions has it
        return tuple(caption for caption in found if THING in re.findall(r"\w+", caption.text))
    return (*found, alt(scene, rng))
