"""The samples of a run, from its sources: looked at, sifted and put into buckets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tuner.data import conditions, index, pictures
from tuner.data.buckets import Assigned, Buckets
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.index import Index, Memory, Share
from tuner.data.jitter import Jitter
from tuner.data.noise import Draws
from tuner.data.samples import Behind, Chosen, Joined, Sample, Samples, sources
from tuner.data.sources.opening import open_specs
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import First, LeftOut, Stream
from tuner.data.views import Masks
from tuner.progress import say


@dataclass(frozen=True)
class Wanted:
    """What a run asks of its data.

    Attributes:
        size: of the square, in pixels, where there are no buckets.
        captions, condition: of all samples but those of sources that have rules of their own.
        cache: None: nothing is cached.
        latents, text: the frozen autoencoder's, the frozen text encoder's output may be cached.
        unreadable: samples that may be left out because they cannot be used.
    """

    size: int
    seed: int
    crop: str
    flip: bool
    captions: CaptionRule
    condition: Condition | None
    cache: Path | None
    latents: bool
    text: bool
    draws: Draws = Draws()
    share: Share = Share()
    buckets: tuple[Buckets, ...] = ()  # of each source; none: squares of `size`
    reading: pictures.Reading = pictures.Reading()
    masks: Masks | None = None
    jitter: Jitter | None = None
    unreadable: int = 0
    captions_of: tuple[tuple[int, CaptionRule], ...] = ()
    condition_of: tuple[tuple[int, Condition], ...] = ()

    def plain(self) -> Wanted:
        """The same for looking instead of training: the first caption, plain noise, nothing dropped,
        mirrored, moved or coloured, everything square; its sources have no rules of their own."""
        return replace(
            self,
            captions=self.captions.plain(),
            flip=False,
            crop="center",
            draws=Draws(),
            buckets=(),
            jitter=None,
            masks=None,
            captions_of=(),
            condition_of=(),
        )


class Opened(NamedTuple):
    """Samples that can be used, with what is known of them.

    Attributes:
        samples, known: those of the sources and behind them the class pictures.
        repeats: how often each of the sources' comes in an epoch, float64 [N].
        assigned: buckets of the sources' samples. A class picture comes in any of them.
        left_out: what is wrong with those that cannot be used.
    """

    samples: Sequence[Sample]
    known: Index
    repeats: npt.NDArray[np.float64]
    assigned: Assigned
    left_out: tuple[str, ...]

    def digest(self) -> str:
        """A hash over the samples: pictures' bytes, captions, conditions, masks, weights."""
        state = hashlib.sha256()
        parts = zip(self.samples, self.known.pictures, self.known.conditions, self.known.masks, strict=True)
        for sample, *known in parts:
            digests = [None if one is None else one.digest for one in known]
            state.update(repr((digests, sample.captions, sample.weight, sample.source)).encode())
        return state.hexdigest()

    def of_source(self, number: int) -> Sequence[Sample]:
        """The samples of one source."""
        return Chosen(self.samples, np.flatnonzero(sources(self.samples) == number).tolist())

    def beside(self, classes: Opened) -> Opened:
        """With class pictures behind."""
        samples, known = Behind(self.samples, classes.samples), self.known.before(classes.known)
        return self._replace(samples=samples, known=known, left_out=self.left_out + classes.left_out)


def open_parts(specs: Sequence[SourceSpec], wanted: Wanted, main: bool) -> list[Samples | Stream]:
    """All sources, those that are read in passing too.

    A source of datasets/ that is missing is made by the main process while the others wait, and then by the
    first ones of other machines, if it is still missing there.

    Args:
        main: whether this is the main process.

    Raises:
        UserError: a source cannot be used. What is wrong with samples is in its problems().
    """
    place = None if wanted.cache is None else wanted.cache / "tars"
    opened = open_specs(specs, say, place, strict=False) if main else []
    wanted.share.wait()
    if wanted.share.first and not main:
        opened = open_specs(specs, lambda line: None, place, strict=False)
    wanted.share.wait()
    return opened or open_specs(specs, lambda line: None, place, strict=False)


def open_sources(
    specs: Sequence[SourceSpec], wanted: Wanted, memory: Memory, main: bool, most: int
) -> Opened:
    """The first samples of sources, looked at; of sources that are read in passing they are held in memory.

    Args:
        memory: of what is known of pictures.
        main: whether this is the main process.
        most: how many samples are wanted.

    Raises:
        UserError: a source or a sample cannot be used.
    """
    parts: list[Samples] = []
    for part in open_parts(specs, wanted, main):
        if isinstance(part, Stream):
            part.left_out = LeftOut(wanted.unreadable, say)
            part = First(part, most - sum(len(before) for before in parts))
        parts.append(part)
    samples = Joined(parts)
    first = Chosen(samples, range(min(most, len(samples))))
    return look_at(first, samples.repeats[:most].astype(np.float64), wanted, memory, samples.problems())


def look_at(
    samples: Sequence[Sample],
    repeats: npt.NDArray[np.float64],
    wanted: Wanted,
    memory: Memory,
    before: Sequence[str] = (),
) -> Opened:
    """Samples with what is known of them, without those that cannot be used.

    Args:
        before: what is wrong with samples that the sources have left out already.

    Raises:
        UserError: more than data.unreadable allows cannot be used.
    """
    known, problems = index.look(samples, memory, wanted.reading, wanted.share)
    if wanted.condition is not None:
        own = dict(wanted.condition_of)
        for number, sample in enumerate(samples):
            how = own.get(sample.source, wanted.condition)
            if sample.condition is None and how.kind == conditions.GIVEN:
                name = sample.picture.name
                problems.setdefault(number, f"{name}: no conditioning_image, which condition: image asks for")
    kept = index.sift(problems, len(samples), wanted.unreadable, before)
    if problems:
        samples, known, repeats = Chosen(samples, kept), known.only(kept), repeats[kept]
    assigned = assign(samples, known, wanted)
    left_out = (*before, *(problems[number] for number in sorted(problems)))
    return Opened(samples, known, repeats, assigned, left_out)


def assign(samples: Sequence[Sample], known: Index, wanted: Wanted) -> Assigned:
    """The samples' buckets, of each source its own."""
    of = sources(samples)
    every = wanted.buckets or tuple(Buckets((wanted.size,), 1) for _ in range(int(of.max(initial=0)) + 1))
    sizes, parts = known.sizes, []
    for number, one in enumerate(every):
        rows = np.flatnonzero(of == number)
        part = one.assign(sizes[rows], lambda at, rows=rows: samples[int(rows[at])].picture.name)  # type: ignore[misc]
        parts.append((part, len(rows)))
    return Assigned.join(parts)
