"""The story of one `tuner caption`: find, caption, score, decide, write."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from tuner.captioning import figures, writing
from tuner.captioning.asked import Asked
from tuner.captioning.captioner import Captioner, How
from tuner.captioning.journal import Journal, key
from tuner.captioning.keeping import Picture, Scored, least
from tuner.captioning.matching import filter_of
from tuner.captioning.models import Model, locate
from tuner.captioning.originals import Finder, Found, Said
from tuner.captioning.settled import settled
from tuner.data import pictures
from tuner.data.blob import File
from tuner.data.cache import Hashes, default_folder
from tuner.data.samples import check
from tuner.device import quiet
from tuner.errors import UserError
from tuner.progress import say, track

NEW = "new"
"""The kind of a new caption where --kind gives no other."""

HASHED = 4096
"""Files that are hashed before their hashes are remembered."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Place = TypeVar("Place", bound=str | tuple[str, str])  # a picture's name, or with a caption


@dataclass
class Job:
    """What is known on the way.

    Attributes:
        found: the pictures that can be used.
        faults: those that cannot, and why.
        batch: pictures at once.
        contents: hashes of the pictures' files.
    """

    folder: Path
    found: list[Found]
    faults: dict[str, str]
    journal: Journal
    batch: int
    contents: dict[str, str] = field(default_factory=dict)

    def drop(self) -> None:
        """Go on without the pictures that cannot be used."""
        self.found = [one for one in self.found if one.name not in self.faults]


def run(asked: Asked) -> None:
    """Caption a folder, filter the captions, and write them to the folder --out.

    Raises:
        UserError: an option is wrong or has no effect; a model does not load; and at the end, when all else
            is written: pictures or lines of a listing that cannot be used, the first 20 of them.
    """
    how, dtype, device = settled(asked)
    quiet()
    hashes = Hashes(default_folder())
    captioner = None if asked.model is None else locate(asked.model, asked.revision, "--model", hashes)
    judge = None if asked.filter is None else locate(asked.filter, asked.filter_revision, "--filter", hashes)
    threshold = None if judge is None else _threshold(judge, asked)
    finder = Finder(asked.folder, asked.caption_column or "text", asked.condition_from, asked.mask_from)
    found = finder.find()
    for text in finder.told:
        say(f"{asked.folder}: {text}")
    kind = asked.kind or NEW
    if captioner is not None and any(said.kind == kind for one in found for said in one.said):
        raise UserError(
            f"{asked.folder}: has captions of kind {kind} already; call the new ones otherwise: --kind"
        )
    with Journal(asked.out) as journal:
        job = Job(asked.folder, found, finder.faults, journal, asked.batch)
        _hash(job, hashes)
        new = {} if captioner is None else _captions(job, captioner, how, dtype, device)
        captions = {
            one.name: [*([Said(kind, new[one.name])] if new.get(one.name) else []), *one.said]
            for one in job.found
        }
        scores = None if judge is None else _scores(job, captions, judge, device)
        limit = None if scores is None else least(list(scores.values()), threshold, asked.share)
        decided = [
            Picture(one, tuple(_scored(one.name, said, kind, scores, limit) for said in captions[one.name]))
            for one in job.found
        ]
        told = figures.figures(decided, len(job.faults), limit)
        writing.write(asked.out, asked.folder, decided, job.faults)
        writing.statistics(asked.out, told)
    for text in figures.lines(told):
        say(text)
    say(f"{asked.out}: a recipe reads it as data.source; every score is in {writing.SCORES}")
    check([*finder.problems, *(f"{asked.folder / name}: {why}" for name, why in sorted(job.faults.items()))])


def _threshold(model: Model, asked: Asked) -> float | None:
    """The least score that is asked for, or that is usual; None: --share is asked for.

    Raises:
        UserError: the model is no filter, or has no usual threshold.
    """
    kind = filter_of(model)
    if asked.threshold is None and asked.share is None and kind.usual is None:
        raise model.fault(
            f"{kind.measure} has no usual threshold; give --threshold, or --share of the captions to keep"
        )
    return kind.usual if asked.threshold is None and asked.share is None else asked.threshold


def _hash(job: Job, hashes: Hashes) -> None:
    """The contents' hashes; files that cannot be read become faults."""
    for name, told in track(_hashed(job, hashes), len(job.found), "looking at files", "files"):
        if isinstance(told, OSError):
            job.faults[name] = f"cannot be read: {told.strerror or told}"
        else:
            job.contents[name] = told
    job.drop()


def _hashed(job: Job, hashes: Hashes) -> Iterator[tuple[str, str | OSError]]:
    """Each picture's name with its content's hash, or why there is none."""
    for start in range(0, len(job.found), HASHED):
        paths = {one.name: job.folder / one.name for one in job.found[start : start + HASHED]}
        try:
            told = hashes.of(paths.values())
            yield from ((name, told[path]) for name, path in paths.items())
        except OSError:
            for name, path in paths.items():
                try:
                    yield name, hashes.of([path])[path]
                except OSError as error:
                    yield name, error


def _captions(job: Job, model: Model, how: How, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """A new caption for each picture that can be read, by name."""
    names = {
        one.name: key(picture=job.contents[one.name], model=model.digest, how=how.told(), dtype=str(dtype))
        for one in job.found
    }
    todo = _missing(job, names)
    if done := len(names) - len(todo):
        say(f"{done} of {len(names)} captions are there already, of an earlier run or an equal picture")
    if todo:
        captioner = Captioner(model, how, dtype, device)
        say(f"captioning {len(todo)} pictures with {model.title} on {device}")
        for batch in _batches(job, todo, "captions"):
            texts = captioner([picture for _, picture in batch], [job.contents[name] for name, _ in batch])
            job.journal.add({names[name]: text for (name, _), text in zip(batch, texts, strict=True)})
    found = _answered(job, names)
    if silent := sum(not text for text in found.values()):
        say(f"{silent} pictures of which {model.title} says nothing")
    return found


def _scores(
    job: Job, captions: dict[str, list[Said]], model: Model, device: torch.device
) -> dict[tuple[str, str], float]:
    """A score for each caption, by the picture's name and its text."""
    names = {
        (one.name, said.text): key(picture=job.contents[one.name], filter=model.digest, text=said.text)
        for one in job.found
        for said in captions[one.name]
    }
    asks: dict[str, list[str]] = {}
    for name, text in _missing(job, names):
        asks.setdefault(name, []).append(text)
    if asks:
        judge = filter_of(model)(model, device)
        say(
            f"scoring {sum(map(len, asks.values()))} captions with {model.title} on {device}: {judge.measure}"
        )
        for batch in _batches(job, list(asks), "scores"):
            texts = [text for name, _ in batch for text in asks[name]]
            of = [number for number, (name, _) in enumerate(batch) for _ in asks[name]]
            told = judge([picture for _, picture in batch], texts, of)
            each = zip(of, texts, told.values, told.cut, strict=True)
            job.journal.add({names[batch[at][0], text]: [value, cut] for at, text, value, cut in each})
    found = _answered(job, names)
    if cut := sum(answer[1] > 0 for answer in found.values()):
        say(f"{cut} captions are longer than {model.title} reads; they are scored by their beginning")
    return {place: answer[0] for place, answer in found.items()}


def _scored(
    name: str,
    said: Said,
    kind: str,
    scores: dict[tuple[str, str], float] | None,
    limit: float | None,
) -> Scored:
    """A caption with its score, and whether it is kept; new ones are those of this kind."""
    if scores is None or limit is None:
        return Scored(said, said.kind == kind, None, True)
    score = scores[name, said.text]
    return Scored(said, said.kind == kind, score, score >= limit)


def _missing(job: Job, names: dict[Place, str]) -> list[Place]:
    """Where there is no answer yet; one place of each name, as equal pictures have equal answers."""
    first: dict[str, Place] = {}
    for place, one in names.items():
        if one not in job.journal.answers:
            first.setdefault(one, place)
    return list(first.values())


def _answered(job: Job, names: dict[Place, str]) -> dict[Place, Any]:
    """The answers by place. What has none has a fault, or an equal picture has it: then it gets it too."""
    by_content = {job.contents[name]: why for name, why in job.faults.items() if name in job.contents}
    for one in job.found:
        if one.name not in job.faults and job.contents[one.name] in by_content:
            job.faults[one.name] = by_content[job.contents[one.name]]
    job.drop()
    there = {one.name for one in job.found}
    answers = job.journal.answers
    return {
        at: answers[one] for at, one in names.items() if (at[0] if isinstance(at, tuple) else at) in there
    }


def _batches(job: Job, names: Sequence[str], what: str) -> Iterator[list[tuple[str, pictures.Picture]]]:
    """Decoded pictures by batches; those that cannot be decoded become faults and leave no gap."""

    def decoded(name: str) -> pictures.Picture | UserError:
        path = job.folder / name
        try:
            return pictures.decode(File(path).read(), str(path)).picture
        except UserError as error:
            return error

    batch: list[tuple[str, pictures.Picture]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        ahead = _ahead(pool, decoded, names, 2 * job.batch)
        for name, picture in track(ahead, len(names), what, "images"):
            if isinstance(picture, UserError):
                job.faults[name] = str(picture).removeprefix(f"{job.folder / name}: ")
                continue
            batch.append((name, picture))
            if len(batch) == job.batch:
                yield batch
                batch = []
    if batch:
        yield batch


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[Item], Answer], items: Iterable[Item], most: int
) -> Iterator[tuple[Item, Answer]]:
    """Each item with what `work` makes of it, at most so many ahead of what is taken."""
    rest = iter(items)
    waiting: deque[tuple[Item, Future[Answer]]] = deque()
    for item in islice(rest, most):
        waiting.append((item, pool.submit(work, item)))
    while waiting:
        item, future = waiting.popleft()
        for following in islice(rest, 1):
            waiting.append((following, pool.submit(work, following)))
        yield item, future.result()
