"""Is the new word's concept recognised, and is the rest of the prompt still obeyed?"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from tuner.evaluate.captions import Named, NamedObject, place_phrase
from tuner.evaluate.judge import read
from tuner.evaluate.measures import Look, Picture, Values, judged, table, without_records
from tuner.evaluate.world import BACKGROUNDS, COLOURS, CONFUSABLE, PLACES
from tuner.sample import sheet


def measure(look: Look) -> dict[str, Values]:
    """The share of pictures that show the concept, with the token and with the initial word."""
    from tuner.methods.textual_inversion import TextualInversion

    (method,) = (m for m in look.sampler.task.each() if isinstance(m, TextualInversion))
    shapes = Counter(thing["shape"] for s in look.trained for thing in (s.scene or {}).get("objects", []))
    if not shapes:
        without_records("Textual Inversion")
        return {}
    concept = shapes.most_common(1)[0][0]
    token = method.config.token
    plain = [f"a photo of a {token}"] * look.count
    detailed, named = zip(*(_detailed(token, i) for i in range(look.count)), strict=True)
    rows: dict[str, dict[str, float]] = {}
    shown: dict[str, list[Picture]] = {}
    for name, adapted in ((f"{token}", True), (f"the initial word ({method.config.init})", False)):
        simple = look.sampler.pictures(plain, adapted=adapted)
        rich = look.sampler.pictures(detailed, adapted=adapted)
        obeyed = judged(rich, named)
        rows[name] = {
            "concept, plain prompt": _share(simple, concept),
            "concept, detailed prompt": _share(rich, concept),
            **{
                f"{key} obeyed": value
                for key, value in obeyed.items()
                if key in ("colour", "background", "place")
            },
        }
        shown[f"{name}: plain"], shown[f"{name}: detailed"] = simple[:6], rich[:6]
    place = look.output / "evaluation" / "concept.png"
    place.parent.mkdir(parents=True, exist_ok=True)
    sheet(shown, list(detailed[:6])).save(place)
    new, old = (row["concept, plain prompt"] for row in rows.values())
    verdict = (
        f"the concept ({concept}) is recognised in {new:.0%} of the pictures of plain prompts with {token}, "
        f"in {old:.0%} with the initial word"
    )
    return {"concept": table(rows, verdict, picture="evaluation/concept.png")}


def _detailed(token: str, number: int) -> tuple[str, Named]:
    """A prompt that asks for more than the concept, and what it names; always the same for a number."""
    rng = np.random.default_rng(number)
    background = str(rng.choice(list(BACKGROUNDS)))
    colours = [c for c in COLOURS if c not in CONFUSABLE.get(background, ())]
    colour, where = str(rng.choice(colours)), str(rng.choice(PLACES))
    article = "an" if colour[0] in "aeiou" else "a"
    prompt = f"{article} {colour} {token} {place_phrase(where)}, on a {background} background"
    return prompt, Named((NamedObject(colour=colour, place=where),), background=background, whole=False)


def _share(pictures: list[Picture], concept: str) -> float:
    """The share of pictures with an object of a shape."""
    found: list[Any] = [any(seen.shape == concept for seen in read(picture).objects) for picture in pictures]
    return float(np.mean(found))
