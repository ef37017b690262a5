"""The feed of a run's samples, with everything encoded beforehand that may be cached."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tuner.data import pictures
from tuner.data.assemble import Opened, Wanted
from tuner.data.cache import NAME, OVERHEAD, Store, key
from tuner.data.captions import joined
from tuner.data.index import Share
from tuner.data.loader import POOLED, Feed, Latents, Texts
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.views import Views
from tuner.disk import free
from tuner.errors import UserError
from tuner.family import Family
from tuner.progress import say, track

ENCODE_AT_ONCE = 16
PIXELS_AT_ONCE = ENCODE_AT_ONCE * 128 * 128
"""What one pass of the autoencoder takes: in float32 its widest layers need half a kilobyte a pixel, each."""
SHARD, SHARD_BYTES, SHARD_SECONDS = 512, 128 * 2**20, 300.0
"""A shard is written when it has so many entries, so many bytes, or took so long."""
SPARE = 2**26
"""Bytes that are to be left on the disk."""
TEXT_LIMIT = 4 * 2**30
"""Bytes of caption encodings that are worth keeping; more than that is encoded anew in each step.

As many captions as a large set has, and far fewer than what shuffled tags may give: 18,000 of
Stable Diffusion 1.x in float32.
"""

Ints = npt.NDArray[np.int64]


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


def unneeded(feeds: Sequence[Feed], family: Family) -> list[str]:
    """The frozen networks that no batch of these feeds asks, as what they would encode is cached."""
    names = ["vae"] * all(feed.latents.store is not None for feed in feeds)
    if all(feed.texts.store is not None for feed in feeds):
        names += family.text_encoders
    networks = family.modules()
    return [name for name in names if not any(p.requires_grad for p in networks[name].parameters())]


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
    texts = Texts(family.tokenize if family.text_encoders else None)
    anew = uncached(wanted, family)
    works: list[_Work] = []
    if wanted.cache is not None and "vae" in family.modules() and "pictures" not in anew:
        latents, work = _latents(opened, views, wanted, family)
        works.append(work)
    if wanted.cache is not None and family.text_encoders and "captions" not in anew:
        texts, more = _texts(opened.samples, wanted, family) or (texts, None)
        works += [more] if more is not None else []
    _announce(works)
    for work in works:
        _encode(work, wanted.share)
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


class _Work(NamedTuple):
    """What is to be encoded into a store.

    Attributes:
        what: `pictures` or `captions`.
        missing: how many entries are, over all processes.
        size: bytes of these.
        chunks: of this process; encode: makes the entries of a chunk.
    """

    what: str
    store: Store
    missing: int
    size: int
    chunks: Sequence[Ints]
    encode: Callable[[Ints], dict[str, Tensor]]


class _Entries(NamedTuple):
    """Encodings of pictures that may be asked for, each once; those of a bucket stand together.

    Attributes:
        sample, bucket: int64 [E]; flip: bool [E], mirrored; name: bytes [E].
    """

    sample: Ints
    bucket: Ints
    flip: npt.NDArray[np.bool_]
    name: npt.NDArray[np.bytes_]


def _latents(opened: Opened, views: Views, wanted: Wanted, family: Family) -> tuple[Latents, _Work]:
    assert wanted.cache is not None
    store = Store(wanted.cache / "latents")
    about = {
        "vae": family.digests["vae"],
        "dtype": "float32",
        "background": str(wanted.reading.background),
        "alpha": wanted.reading.alpha,
    }
    digests = opened.known.pictures.hexes
    latents = Latents(family.latent_channels, family.factor, store, digests, tuple(sorted(about.items())))
    shapes = opened.assigned.shapes
    entries = _entries(opened, views, latents)
    lacks, still = ~store.has(entries.name), replace(views, flip=False)

    def encode(chunk: Ints) -> dict[str, Tensor]:
        slots = [Slot(int(entries.sample[e]), 0, 0, 1.0, shapes[entries.bucket[e]]) for e in chunk]
        looks = [still.picture(slot) for slot in slots]
        looks = [
            look[:, ::-1] if flip else look for look, flip in zip(looks, entries.flip[chunk], strict=True)
        ]
        pixels = torch.from_numpy(np.stack([pictures.to_signed(p) for p in looks])).to(family.device)
        both = torch.cat(family.encode_images(pixels), dim=1).cpu()
        names = [views.samples[slot.sample].picture.name for slot in slots]
        _check_finite(names, both, "the autoencoder", "take another one (base.vae)")
        return {_text(entries.name[e]): row.clone() for e, row in zip(chunk, both, strict=True)}

    sides = np.array(shapes, np.int64).reshape(-1, 2) // family.factor
    each = 2 * family.latent_channels * sides.prod(axis=1) * 4
    size = int((each * np.bincount(entries.bucket[lacks], minlength=len(shapes))).sum())
    chunks: list[Ints] = []
    mine = _mine(lacks, wanted.share)
    for group in np.split(mine, np.flatnonzero(np.diff(entries.bucket[mine])) + 1):
        chunks += _cut(group, pictures_at_once(*shapes[entries.bucket[group[0]]])) if len(group) else []
    latents = replace(latents, entries=len(lacks))
    return latents, _Work("pictures", store, int(lacks.sum()), size, chunks, encode)


def _entries(opened: Opened, views: Views, latents: Latents) -> _Entries:
    """Every encoding that may be asked for: each sample in each of its buckets, mirrored too if it may be."""
    about = opened.assigned
    classes = np.arange(len(opened.repeats), len(opened.samples))
    parts = []
    for number, shape in enumerate(about.shapes):
        of = np.concatenate([np.unique(about.sample[about.bucket == number]), classes])
        for flip in (False, True) if views.flip else (False,):
            names = np.array(latents.names(of.tolist(), shape, flip), NAME)
            parts.append(_Entries(of, np.full(len(of), number), np.full(len(of), flip), names))
    sample, bucket, flips, every = (np.concatenate(column) for column in zip(*parts, strict=True))
    _, first = np.unique(every, return_index=True)
    first.sort()
    return _Entries(sample[first], bucket[first], flips[first], every[first])


def _mine(lacks: npt.NDArray[np.bool_], share: Share) -> Ints:
    """The entries that this process encodes.

    Shared out before it is known what is missing, so that it is the same to each however they hurry.
    """
    mine = np.arange(share.rank, len(lacks), share.processes)
    return mine[lacks[mine]]


def _cut(items: Ints, size: int) -> list[Ints]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _text(name: np.bytes_) -> str:
    return name.decode()


def _texts(samples: Sequence[Sample], wanted: Wanted, family: Family) -> tuple[Texts, _Work] | None:
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

    names = [name(caption) for caption in captions]
    lacks = ~store.has(np.array(names, NAME))

    def encode(chunk: Ints) -> dict[str, Tensor]:
        those = [captions[number] for number in chunk]
        with torch.no_grad():
            tokens = family.tokenize(those).to(family.device)
            text = family.encode_prompts(tokens).map(lambda tensor: tensor.cpu())
        told = [f"the caption {caption!r}" for caption in those]
        _check_finite(told, text.hidden, "the text encoder", "take train.precision: fp32")
        entries = {names[number]: row.clone() for number, row in zip(chunk, text.hidden, strict=True)}
        if text.pooled is not None:
            pooled = zip(chunk, text.pooled, strict=True)
            entries |= {POOLED.format(names[number]): row.clone() for number, row in pooled}
        return entries

    chunks = _cut(_mine(lacks, wanted.share), ENCODE_AT_ONCE)
    work = _Work("captions", store, int(lacks.sum()), int(lacks.sum()) * size, chunks, encode)
    return Texts(family.tokenize, store, name, one.pooled is not None, len(names)), work


def _check_finite(names: Sequence[str], encoded: Tensor, encoder: str, advice: str) -> None:
    """What is no finite number is never kept: it would look like a fault of the training.

    Raises:
        UserError: an encoding [B, ...] is not finite; it names what was encoded.
    """
    for name, one in zip(names, encoded, strict=True):
        if not bool(one.isfinite().all()):
            raise UserError(f"{name}: {encoder} makes no finite numbers of it; {advice}, or leave it out")


def _announce(works: Sequence[_Work]) -> None:
    """Say what is going to be encoded, and how much room it takes.

    Raises:
        UserError: the disk has not as much.
    """
    needed, room = 0, 0
    for work in works:
        if work.missing:
            size, room = work.size + work.missing * OVERHEAD, free(work.store.folder)
            needed += size
            told = f"about {amount(size)} into {work.store.folder}, {amount(room)} are free"
            say(f"{work.what} to encode: {work.missing}, {told}")
    if needed and needed + SPARE > room:
        folder = works[0].store.folder.parent
        raise UserError(
            f"data.cache: {folder}: what is to be encoded takes about {amount(needed)}, "
            f"and {amount(room)} are free; make room, name another folder, or set 'off': encode in each step"
        )


def amount(size: int) -> str:
    """Bytes in words: 3 MiB, 1.2 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"


def _encode(work: _Work, share: Share) -> None:
    """Encode what the cache lacks, a shard at a time; what is ready is written when it is stopped, too."""
    shard: dict[str, Tensor] = {}
    size, begun = 0, time.monotonic()
    try:
        count = sum(map(len, work.chunks))
        chunks = track(work.chunks, len(work.chunks), f"encoding {work.what} ({count})", "batches")
        for chunk in chunks if count else ():
            fresh = work.encode(chunk)
            shard |= fresh
            size += sum(tensor.nbytes for tensor in fresh.values())
            if len(shard) >= SHARD or size >= SHARD_BYTES or time.monotonic() - begun >= SHARD_SECONDS:
                ready, shard = shard, {}
                work.store.write(ready)
                size, begun = 0, time.monotonic()
    finally:
        if shard:
            work.store.write(shard)
    share.wait()
    work.store.refresh()
