"""Does a ControlNet follow its condition? Edge F1 between floor and ceiling, and what it costs the prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tuner.data.pictures import to_signed
from tuner.evaluate.edges import canny, edge_f1
from tuner.evaluate.measures import Look, Picture, Values, judged, table, without_records
from tuner.sample import sheet, to_pictures, write_png

SHOWN = 8
CURVE = "edge_f1"
"""The scalar that previews log: F1 within 1 pixel of their edges, to find when they are followed."""


def fidelity(pictures: Sequence[Picture], edges: Sequence[Picture]) -> dict[str, float]:
    """Mean F1 of the pictures' edges (denoised for measuring only) against the condition's."""
    found = [canny(picture, smooth=True) for picture in pictures]
    strict = [edge_f1(f, e[:, :, 0], 0) for f, e in zip(found, edges, strict=True)]
    tolerant = [edge_f1(f, e[:, :, 0], 1) for f, e in zip(found, edges, strict=True)]
    return {"strict F1": float(np.mean(strict)), "F1 within 1 pixel": float(np.mean(tolerant))}


def share_of_way(value: float, floor: float, ceiling: float) -> float:
    """How far a value is from floor to ceiling: 0 at the floor, 1 at the ceiling; nan where they are one."""
    return (value - floor) / (ceiling - floor) if ceiling != floor else math.nan


def probe(conditions: Sequence[Picture], pictures: Sequence[Picture]) -> dict[str, float]:
    """What a preview tells of the training, as scalars for the log."""
    return {CURVE: fidelity(pictures, conditions)["F1 within 1 pixel"]}


def measure(look: Look) -> dict[str, Values]:
    """Edge fidelity with the right prompt and with none; the judge's figures.

    Floor: the base alone, from the same noise. Ceiling: the original through the autoencoder.
    """
    if look.heldout.condition is None or look.heldout.condition.kind != "canny":
        return {}
    originals = look.originals()
    edges = [
        look.heldout.condition_picture(slot, picture)
        for slot, picture in zip(look.slots(), originals, strict=True)
    ]
    right = look.prompts("long")
    none = [""] * len(right)
    pictures = {
        "right prompt": look.sampler.pictures(right, edges),
        "no prompt": look.sampler.pictures(none, edges),
        "floor, right prompt": look.sampler.pictures(right, adapted=False),
        "floor, no prompt": look.sampler.pictures(none, adapted=False),
        "ceiling": _round_trip(look, originals),
    }
    rows = {name: fidelity(made, edges) for name, made in pictures.items()}
    ceiling = rows["ceiling"]
    way = {}
    for prompt, floor in (
        ("right prompt", "floor, right prompt"),
        ("no prompt", "floor, no prompt"),
    ):
        way[prompt] = {
            column: share_of_way(rows[prompt][column], rows[floor][column], ceiling[column])
            for column in ceiling
        }
    key = "F1 within 1 pixel"
    verdict = (
        f"of the way from floor to ceiling (F1 within 1 pixel): {way['right prompt'][key]:.0%} with the "
        f"right prompt, {way['no prompt'][key]:.0%} with none"
    )
    place = look.output / "evaluation" / "edges.png"
    columns = {"condition": edges, **pictures, "original": originals}
    write_png(place, sheet({n: list(p[:SHOWN]) for n, p in columns.items()}, right[:SHOWN]))
    rows |= {f"way, {prompt}": values for prompt, values in way.items()}
    found = {"edges followed": table(rows, verdict + _onset(look), picture="evaluation/edges.png")}
    named = look.named("long")
    if named is None:
        without_records("ControlNet")
        return found
    judge = {n: judged(pictures[n], named) for n in ("right prompt", "floor, right prompt")}
    judge["ceiling"] = judged(pictures["ceiling"], named)
    colour, base = judge["right prompt"]["colour"], judge["floor, right prompt"]["colour"]
    verdict = (
        f"colours named in the prompt right: {colour:.0%} with the ControlNet, {base:.0%} with the base alone"
    )
    return found | {"prompt obeyed": table(judge, verdict)}


def _onset(look: Look) -> str:
    """When the previews began to follow their edges, in words."""
    points = look.curves.get(CURVE, [])
    found = jump([step for step, _ in points], [value for _, value in points])
    if found is None:
        return ""
    return (
        f"; the previews jumped to their edges at step {found[1]} "
        f"(10 to 90 % of the rise: {found[0]} to {found[2]})"
    )


def _round_trip(look: Look, originals: Sequence[Picture]) -> list[Picture]:
    """The originals through the autoencoder."""
    family = look.sampler.task.family
    out: list[Picture] = []
    for start in range(0, len(originals), 16):
        pixels = torch.from_numpy(np.stack([to_signed(p) for p in originals[start : start + 16]]))
        out += to_pictures(family.decode_latents(family.encode_images(pixels.to(family.device)).mean))
    return out


def jump(steps: Sequence[int], values: Sequence[float]) -> tuple[int, int, int] | None:
    """The step at which a fidelity curve jumps: where it passes 10, 50 and 90 % of its whole rise.

    The levels are taken between the mean of the first tenth of the curve (at least one point) and its largest
    value. None where the curve has fewer than 4 points or rises by less than 0.1.
    """
    if len(values) < 4:
        return None
    start = float(np.mean(values[: max(1, len(values) // 10)]))
    rise = max(values) - start
    if rise < 0.1:
        return None

    def passes(share: float) -> int:
        return next(s for s, v in zip(steps, values, strict=True) if v >= start + share * rise)

    return passes(0.1), passes(0.5), passes(0.9)
