"""The data of a run: samples from the sources, encodings from the cache, and the feed that makes batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tuner.data import pictures
from tuner.data.cache import Hashes, Store, key
from tuner.data.captions import CaptionRule, joined
from tuner.data.loader import POOLED, Feed, Latents, Texts
from tuner.data.noise import Draws
from tuner.data.sources import Sample, open_source
from tuner.family import Family
from tuner.progress import say, track

ENCODE_AT_ONCE = 16
PIXELS_AT_ONCE = ENCODE_AT_ONCE * 128 * 128
"""What one pass of the autoencoder takes: in float32 its widest layers need half a kilobyte a pixel, each."""
SHARD = 512
TEXT_LIMIT = 256 * 2**20
"""Bytes of caption encodings that are worth keeping; more than that is encoded anew in each step."""


@dataclass(frozen=True)
class Wanted:
    """What a run asks of its data."""

    size: int
    seed: int
    crop: str
    flip: bool
    captions: CaptionRule
    condition: str | None
    cache: Path | None  # None: nothing is cached
    latents: bool  # the frozen autoencoder's output may be cached
    text: bool  # the frozen text encoder's output may be cached
    draws: Draws = Draws()
    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None  # for all processes

    def plain(self) -> Wanted:
        """The same for looking instead of training: the first caption, plain noise, nothing dropped,
        mirrored or moved."""
        return replace(self, captions=self.captions.plain(), flip=False, crop="center", draws=Draws())


def read_sources(
    places: Sequence[tuple[str, int]], main: bool, wait: Callable[[], None]
) -> tuple[list[Sample], list[int]]:
    """The samples of all sources, and for each how often it comes in an epoch.

    A source of datasets/ that is missing is made by the main process while the others wait.
    """
    if main:
        for place, _ in places:
            open_source(place, say)
    wait()
    found = [(sample, times) for place, times in places for sample in open_source(place, say)]
    return [sample for sample, _ in found], [times for _, times in found]


def digest(samples: Sequence[Sample], hashes: Hashes) -> str:
    """A hash over the samples: pictures' bytes, captions, given conditions."""
    found = hashes.of([s.path for s in samples] + [s.condition for s in samples if s.condition])
    state = hashlib.sha256()
    for s in samples:
        condition = found[s.condition] if s.condition else ""
        state.update(repr((found[s.path], s.captions, condition)).encode())
    return state.hexdigest()


def feed(samples: Sequence[Sample], wanted: Wanted, family: Family, hashes: Hashes) -> Feed:
    """The feed of some samples, with everything encoded that may be cached."""
    latents = Latents(family.latent_channels, family.factor)
    stays = wanted.crop == "center" and not family.inpainting  # else the pixels are needed in each step
    if wanted.latents and wanted.cache is not None and stays and "vae" in family.modules():
        latents = _cache_latents(samples, wanted, family, hashes)
    texts = Texts(family.tokenize if family.text_encoders else None)
    if wanted.text and wanted.cache is not None and family.text_encoders:
        texts = _cache_text(samples, wanted, family) or texts
    return Feed(
        samples,
        wanted.size,
        wanted.seed,
        wanted.captions,
        latents,
        texts,
        wanted.condition,
        wanted.flip,
        wanted.crop,
        draws=wanted.draws,
        sizes=family.told_sizes,
        holes=family.inpainting,
    )


def pictures_at_once(size: int) -> int:
    """How many pictures of this side, in pixels, are encoded together: 16 up to 128, 1 from 512 on."""
    return max(1, min(ENCODE_AT_ONCE, PIXELS_AT_ONCE // size**2))


def _cache_latents(samples: Sequence[Sample], wanted: Wanted, family: Family, hashes: Hashes) -> Latents:
    assert wanted.cache is not None
    store = Store(wanted.cache / "latents")
    found = hashes.of(s.path for s in samples)
    flips = (False, True) if wanted.flip else (False, False)

    def name(sample: Sample, flip: bool) -> str:
        return key(
            picture=found[sample.path],
            size=wanted.size,
            crop="center",
            flip=flip,
            vae=family.digests["vae"],
            dtype="float32",
        )

    names = [(name(s, flips[0]), name(s, flips[1])) for s in samples]
    entries = {
        n: (s, flip)
        for s, both in zip(samples, names, strict=True)
        for n, flip in zip(both, flips, strict=True)
    }
    # Shared out before it is known what is missing, so that it is the same to each however they hurry.
    items = [item for item in list(entries.items())[wanted.rank :: wanted.processes] if item[0] not in store]

    def encode(chunk: Sequence[tuple[str, tuple[Sample, bool]]]) -> dict[str, Tensor]:
        looks = [pictures.Transform(wanted.size, flip=flip)(pictures.load(s.path)) for _, (s, flip) in chunk]
        pixels = torch.from_numpy(np.stack([pictures.to_signed(p) for p in looks])).to(family.device)
        both = torch.cat(family.encode_images(pixels), dim=1).cpu()
        return {n: row.clone() for (n, _), row in zip(chunk, both, strict=True)}

    _encode(items, encode, store, "encoding pictures", pictures_at_once(wanted.size))
    wanted.wait()
    store.refresh()
    return Latents(family.latent_channels, family.factor, store, names)


def _cache_text(samples: Sequence[Sample], wanted: Wanted, family: Family) -> Texts | None:
    """The cache of all captions that may come; None where they are too many to keep."""
    assert wanted.cache is not None
    with torch.no_grad():
        one = family.encode_prompts(family.tokenize([""]).to(family.device))
    size = one.hidden.nbytes + (0 if one.pooled is None else one.pooled.nbytes)
    most = TEXT_LIMIT // size
    found = joined((sample.every(wanted.captions) for sample in samples), most)
    if found is None:
        say(f"more than {most} captions may come, too many to keep encoded; they are encoded in each step")
        return None
    captions = sorted(found)
    store = Store(wanted.cache / "text")
    read = {n: d for n, d in family.digests.items() if n.startswith(("text_encoder", "tokenizer"))}
    options = family.options
    about = {
        "tokenizers and encoders": read,
        "clip_skip": options.clip_skip,
        "windows": options.windows,
        "quantise": options.quantise,
        "dtype": str(one.hidden.dtype),
    }

    def name(caption: str) -> str:
        return key(caption=caption, **about)

    items = [(name(c), c) for c in captions]
    items = [item for item in items[wanted.rank :: wanted.processes] if item[0] not in store]

    def encode(chunk: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        with torch.no_grad():
            tokens = family.tokenize([c for _, c in chunk]).to(family.device)
            text = family.encode_prompts(tokens).map(lambda tensor: tensor.cpu())
        entries = {n: row.clone() for (n, _), row in zip(chunk, text.hidden, strict=True)}
        if text.pooled is not None:
            pooled = zip(chunk, text.pooled, strict=True)
            entries |= {POOLED.format(n): row.clone() for (n, _), row in pooled}
        return entries

    _encode(items, encode, store, "encoding captions")
    wanted.wait()
    store.refresh()
    return Texts(family.tokenize, store, name, one.pooled is not None)


Item = TypeVar("Item")


def _encode(
    items: Sequence[Item],
    encode: Callable[[Sequence[Item]], dict[str, Tensor]],
    store: Store,
    description: str,
    at_once: int = ENCODE_AT_ONCE,
) -> None:
    """Encode what the cache lacks, a shard at a time."""
    if not items:
        return
    shard: dict[str, Tensor] = {}
    chunks = [items[i : i + at_once] for i in range(0, len(items), at_once)]
    for chunk in track(chunks, len(chunks), f"{description} ({len(items)})", "batches"):
        shard |= encode(chunk)
        if len(shard) >= SHARD:
            store.write(shard)
            shard = {}
    if shard:
        store.write(shard)
