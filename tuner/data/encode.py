"""The feed of a run's samples, with everything encoded beforehand that may be cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from tuner.data import pictures
from tuner.data.assemble import Opened, Wanted
from tuner.data.cache import Store, key
from tuner.data.captions import joined
from tuner.data.loader import POOLED, Feed, Latents, Texts
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.views import Views
from tuner.family import Family
from tuner.progress import say, track

ENCODE_AT_ONCE = 16
PIXELS_AT_ONCE = ENCODE_AT_ONCE * 128 * 128
"""What one pass of the autoencoder takes: in float32 its widest layers need half a kilobyte a pixel, each."""
SHARD = 512
TEXT_LIMIT = 256 * 2**20
"""Bytes of caption encodings that are worth keeping; more than that is encoded anew in each step."""


def uncached(wanted: Wanted, family: Family) -> dict[str, str]:
    """What is encoded in each step although there is a cache, `pictures` or `captions`, and why."""
    if wanted.cache is None:
        return {}
    reasons = (
        (not wanted.latents, "the method sees the pixels"),
        (wanted.crop == "random", "data.crop: random shows another part of a picture each time"),
        (wanted.jitter is not None, "data.jitter changes colours each time"),
        (family.inpainting, "the base sees another hole each time"),
    )
    found = {}
    if "vae" in family.modules() and any(true for true, _ in reasons):
        found["pictures"] = "; ".join(reason for true, reason in reasons if true)
    if family.text_encoders and not wanted.text:
        found["captions"] = "what reads them is trained"
    return found


def feed(opened: Opened, wanted: Wanted, family: Family) -> Feed:
    """The feed of some samples, with everything encoded that may be cached."""
    views = Views(
        opened.samples,
        wanted.size,
        wanted.seed,
        wanted.crop,
        wanted.flip,
        wanted.condition,
        wanted.condition_of,
        wanted.reading,
        wanted.masks,
        wanted.jitter,
    )
    latents = Latents(family.latent_channels, family.factor)
    anew = uncached(wanted, family)
    if wanted.cache is not None and "vae" in family.modules() and "pictures" not in anew:
        latents = _cache_latents(opened, views, wanted, family)
    texts = Texts(family.tokenize if family.text_encoders else None)
    if wanted.cache is not None and family.text_encoders and "captions" not in anew:
        texts = _cache_text(opened.samples, wanted, family) or texts
    return Feed(
        views,
        wanted.captions,
        latents,
        texts,
        wanted.captions_of,
        told=opened.known.sizes if family.told_sizes else None,
        holes=family.inpainting,
        draws=wanted.draws,
        left_out=opened.left_out,
    )


def pictures_at_once(height: int, width: int) -> int:
    """How many pictures of a size in pixels are encoded together: 16 up to 128 x 128, 1 from 512 x 512 on."""
    return max(1, min(ENCODE_AT_ONCE, PIXELS_AT_ONCE // (height * width)))


class _Entry(NamedTuple):
    """What is to be encoded."""

    name: str
    slot: Slot
    flip: bool


def _cache_latents(opened: Opened, views: Views, wanted: Wanted, family: Family) -> Latents:
    assert wanted.cache is not None
    store, share = Store(wanted.cache / "latents"), wanted.share
    about = {
        "vae": family.digests["vae"],
        "dtype": "float32",
        "background": str(wanted.reading.background),
        "alpha": wanted.reading.alpha,
    }
    digests = [known.digest for known in opened.known.pictures]
    latents = Latents(family.latent_channels, family.factor, store, digests, tuple(sorted(about.items())))
    # Shared out before it is known what is missing, so that it is the same to each however they hurry.
    entries = list({entry.name: entry for entry in _entries(opened, views, latents)}.values())
    items = [entry for entry in entries[share.rank :: share.processes] if entry.name not in store]
    still = replace(views, flip=False)

    def encode(chunk: Sequence[_Entry]) -> dict[str, Tensor]:
        looks = [still.picture(entry.slot) for entry in chunk]
        looks = [look[:, ::-1] if entry.flip else look for look, entry in zip(looks, chunk, strict=True)]
        pixels = torch.from_numpy(np.stack([pictures.to_signed(p) for p in looks])).to(family.device)
        both = torch.cat(family.encode_images(pixels), dim=1).cpu()
        return {entry.name: row.clone() for entry, row in zip(chunk, both, strict=True)}

    _encode(_alike(items, views), len(items), encode, store, "encoding pictures")
    share.wait()
    store.refresh()
    return latents


def _entries(opened: Opened, views: Views, latents: Latents) -> Iterator[_Entry]:
    """Every encoding that may be asked for: each sample in each of its buckets, mirrored too if it may be."""
    about = opened.assigned
    rows = [(n, about.shapes[b]) for n, b in zip(about.sample.tolist(), about.bucket.tolist(), strict=True)]
    classes = range(len(opened.repeats), len(opened.samples))
    rows += [(number, shape) for number in classes for shape in about.shapes]
    for number, bucket in rows:
        slot = Slot(number, 0, 0, 1.0, bucket)
        for flip in (False, True) if views.flip else (False,):
            yield _Entry(latents.name(number, views.shape(slot), flip), slot, flip)


def _alike(items: Sequence[_Entry], views: Views) -> list[Sequence[_Entry]]:
    """The entries in chunks of one size that are encoded together."""
    shapes: dict[tuple[int, int], list[_Entry]] = {}
    for item in items:
        shapes.setdefault(views.shape(item.slot), []).append(item)
    return [
        those[start : start + pictures_at_once(*shape)]
        for shape, those in shapes.items()
        for start in range(0, len(those), pictures_at_once(*shape))
    ]


def _cache_text(samples: Sequence[Sample], wanted: Wanted, family: Family) -> Texts | None:
    """The cache of all captions that may come; None where they are too many to keep."""
    assert wanted.cache is not None
    with torch.no_grad():
        one = family.encode_prompts(family.tokenize([""]).to(family.device))
    size = one.hidden.nbytes + (0 if one.pooled is None else one.pooled.nbytes)
    most = TEXT_LIMIT // size
    rules = dict(wanted.captions_of)
    every = (sample.every(rules.get(sample.source, wanted.captions)) for sample in samples)
    found = joined(every, most)
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
    items = [item for item in items[wanted.share.rank :: wanted.share.processes] if item[0] not in store]

    def encode(chunk: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        with torch.no_grad():
            tokens = family.tokenize([c for _, c in chunk]).to(family.device)
            text = family.encode_prompts(tokens).map(lambda tensor: tensor.cpu())
        entries = {n: row.clone() for (n, _), row in zip(chunk, text.hidden, strict=True)}
        if text.pooled is not None:
            pooled = zip(chunk, text.pooled, strict=True)
            entries |= {POOLED.format(n): row.clone() for (n, _), row in pooled}
        return entries

    chunks = [items[start : start + ENCODE_AT_ONCE] for start in range(0, len(items), ENCODE_AT_ONCE)]
    _encode(chunks, len(items), encode, store, "encoding captions")
    wanted.share.wait()
    store.refresh()
    return Texts(family.tokenize, store, name, one.pooled is not None)


Item = TypeVar("Item")


def _encode(
    chunks: Sequence[Sequence[Item]],
    count: int,
    encode: Callable[[Sequence[Item]], dict[str, Tensor]],
    store: Store,
    description: str,
) -> None:
    """Encode what the cache lacks, a shard at a time."""
    if not count:
        return
    shard: dict[str, Tensor] = {}
    for chunk in track(chunks, len(chunks), f"{description} ({count})", "batches"):
        shard |= encode(chunk)
        if len(shard) >= SHARD:
            store.write(shard)
            shard = {}
    if shard:
        store.write(shard)
