"""Is a new word's concept recognised, is the rest of the prompt still obeyed, and where did its rows go?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.evaluate.captions import Named, NamedObject, place_phrase
from tuner.evaluate.judge import read
from tuner.evaluate.measures import Look, Picture, Values, judged, table, without_records
from tuner.evaluate.world import BACKGROUNDS, COLOURS, CONFUSABLE, PLACES
from tuner.family import Family
from tuner.method import Method
from tuner.methods.textual_inversion import TextualInversion, Word
from tuner.sample import sheet, write_png
from tuner.task import Task

NEAREST = 5


def measure(look: Look) -> dict[str, Values]:
    """The share of pictures that show each word's concept, with the token and with what it started from."""
    method = _method(look.sampler.task.each())
    concepts = {word.token: _concept(look, word.token, len(method.words) == 1) for word in method.words}
    if not all(concepts.values()):
        without_records("Textual Inversion")
        return {}
    rows: dict[str, dict[str, float]] = {}
    shown: dict[str, list[Picture]] = {}
    verdicts = []
    for word in method.words:
        concept = str(concepts[word.token])
        made, seen = _with_and_without(look, word, concept)
        rows |= made
        shown |= seen
        new, old = (row["concept, plain prompt"] for row in made.values())
        verdicts.append(
            f"the concept ({concept}) is recognised in {new:.0%} of the pictures of plain prompts with "
            f"{word.token}, in {old:.0%} with the initial word"
        )
    place = look.output / "evaluation" / "concept.png"
    token = method.words[0].token if len(method.words) == 1 else "..."
    details = [_detailed(token, i)[0] for i in range(min(6, look.count))]
    write_png(place, sheet(shown, details))
    return {"concept": table(rows, "; ".join(verdicts), picture="evaluation/concept.png")}


def weights(task: Task) -> dict[str, Values]:
    """Of each new row: the nearest known tokens by cosine, its norm, and how far it went from its start."""
    method = _method(task.each())
    rows: dict[str, list[Any]] = {}
    drifts = []
    for encoder, learned in method.rows.items():
        start, known = method.start(encoder), task.family.embedding(encoder).weight.detach().float()
        names = _tokens(task.family, encoder)
        behind = f" ({encoder})" if len(method.encoders) > 1 else ""
        for name, row, before in zip(method.names, learned.detach().float(), start, strict=True):
            drift = float((row - before).norm() / before.norm().clamp(min=1e-12))
            drifts.append(drift)
            near = _nearest(row, known, names)
            rows[f"{name}{behind}"] = [near, float(row.norm()), float(before.norm()), drift]
    verdict = f"{len(rows)} rows went {np.mean(drifts):.0%} of their start's norm away from it on average"
    columns = ["nearest known tokens (cosine)", "norm", "norm at the start", "drift / norm at the start"]
    return {"new words": {"verdict": verdict, "columns": columns, "rows": rows}}


def _method(methods: Sequence[Method]) -> TextualInversion:
    (found,) = (method for method in methods if isinstance(method, TextualInversion))
    return found


def _tokens(family: Family, encoder: str) -> list[str]:
    """How the known tokens of a text encoder are written, by id."""
    tokenizer = cast(Any, family).tokenizers[encoder]
    count = family.embedding(encoder).num_embeddings
    return [str(name).replace("</w>", "") for name in tokenizer.convert_ids_to_tokens(range(count))]


def _nearest(row: Tensor, known: Tensor, names: Sequence[str]) -> str:
    """`star 0.71, moon 0.55 ...`: the known rows with the largest cosines."""
    likeness = F.cosine_similarity(known, row[None].to(known.device), dim=1)
    best = torch.topk(likeness, min(NEAREST, len(names)))
    return ", ".join(f"{names[i]} {value:.2f}" for value, i in zip(*map(Tensor.tolist, best), strict=True))


def _concept(look: Look, token: str, alone: bool) -> str | None:
    """The commonest shape in the training pictures (whose captions have the token); None without records."""
    written = look.heldout.captions.extremes
    own = [s for s in look.trained if alone or any(token in caption for caption in written(s.captions))]
    shapes = Counter(thing["shape"] for s in own for thing in (s.scene or {}).get("objects", []))
    return str(shapes.most_common(1)[0][0]) if shapes else None


def _with_and_without(
    look: Look, word: Word, concept: str
) -> tuple[dict[str, dict[str, float]], dict[str, list[Picture]]]:
    """Figures and pictures of prompts with a word as it was learned, and as it started."""
    token = word.token
    plain = [f"a photo of a {token}"] * look.count
    detailed, named = zip(*(_detailed(token, i) for i in range(look.count)), strict=True)
    rows: dict[str, dict[str, float]] = {}
    shown: dict[str, list[Picture]] = {}
    of = "" if len(_method(look.sampler.task.each()).words) == 1 else f" of {token}"
    for name, adapted in ((token, True), (f"the initial word{of} ({word.init})", False)):
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
    return rows, shown


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
