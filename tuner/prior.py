"""Class pictures: what a base draws of a word by itself, trained on beside so that it is not forgotten.

Prior preservation of DreamBooth (arXiv 2208.12242, section 3.3).
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from tuner.data import cache
from tuner.data.blob import File
from tuner.data.index import Share
from tuner.data.samples import Sample
from tuner.data.sources.tree import PICTURES
from tuner.errors import UserError
from tuner.export.files import write_whole
from tuner.method import Prior
from tuner.progress import say, track
from tuner.sample import Sampler, pictures_at_once

VERSION = 2
"""Raised by hand when what is drawn for the same numbers changes."""


def samples(prior: Prior, sampler: Sampler, place: Path | None) -> list[Sample]:
    """The class pictures, whose caption is taken as it is; those that the base draws need not be there yet.

    Args:
        sampler: how they are drawn; its seed is the first picture's.
        place: the cache's folder; None: nothing is cached.

    Raises:
        UserError: there is no picture in `prior.source`, or no folder to draw into.
    """
    key = next(f"method.{method.kind}.prior" for method in sampler.task.each() if method.prior is prior)
    if prior.source is not None:
        folder = Path(prior.source)
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
        if not found:
            raise UserError(f"{key}.source: {folder}: no pictures there")
    elif place is None:
        raise UserError(
            "data.cache: found off, but class pictures are drawn into the cache: give it a folder, "
            f"or {key}.source"
        )
    else:
        folder = place / "class" / _name(prior, sampler)
        found = [folder / f"{number:05d}.png" for number in range(prior.count)]
    return [Sample(File(picture), (prior.prompt,), fixed=True) for picture in found]


def draw(prior: Prior, sampler: Sampler, wanted: Sequence[Sample], share: Share) -> None:
    """Let the base draw the pictures that are missing; each process draws its share.

    Lots are the same however often it was stopped, so that the pictures are. Call it while the methods still
    are at their start: the sampler's base must be the base itself.
    """
    if prior.source is not None:
        return
    places = [sample.picture.path for sample in wanted if isinstance(sample.picture, File)]
    size = pictures_at_once(sampler.size)
    lots = [range(first, min(first + size, len(places))) for first in range(0, len(places), size)]
    mine = lots[share.rank :: share.processes]
    mine = [lot for lot in mine if not all(places[number].is_file() for number in lot)]
    if mine:
        say(f"drawing class pictures into {places[0].parent}")
    for lot in track(mine, len(mine), f"class pictures ({sum(map(len, mine))})", "lots"):
        made = replace(sampler, seed=sampler.seed + lot.start).pictures([prior.prompt] * len(lot))
        for number, picture in zip(lot, made, strict=True):
            data = io.BytesIO()
            Image.fromarray(picture).save(data, "PNG")
            write_whole(places[number], data.getvalue())


def _name(prior: Prior, sampler: Sampler) -> str:
    """A hash of all that a picture depends on besides its number; how many are drawn is not among it."""
    family = sampler.task.family
    options = family.options
    return cache.key(
        kind="class pictures",
        code=VERSION,
        prompt=prior.prompt,
        base=family.digests,
        scheduler=json.dumps(dict(family.scheduler_config), sort_keys=True, default=str),
        read=[options.clip_skip, options.windows],
        size=sampler.size,
        steps=sampler.steps,
        guidance=sampler.guidance,
        seed=sampler.seed,
        precision=str(sampler.accelerator.mixed_precision),
    )
