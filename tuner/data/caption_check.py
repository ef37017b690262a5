"""Captions that are longer than the base reads, and what it reads of them; looked at before a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from tuner.data.captions import CaptionRule
from tuner.data.samples import Sample
from tuner.errors import UserError
from tuner.method import Method
from tuner.text import WINDOW, Tokens

AT_ONCE = 1024  # captions tokenised together
SHOWN = 10

Tokenize = Callable[[Sequence[str]], Tokens]


def check(
    samples: Sequence[Sample],
    rule: CaptionRule,
    methods: Sequence[Method],
    tokenize: Tokenize | None,
    windows: int,
) -> str | None:
    """What a run says of its captions: how many are cut, and which; None where all are read whole.

    Args:
        samples: those trained on with captions that the rule makes.
        tokenize: captions -> Tokens of `windows` windows; None: nothing reads them.

    Raises:
        UserError: samples without a caption that may be chosen; captions that a method cannot learn from,
            or not from what the base reads of them. All of the first of these kinds that there are.
    """
    # What learns from the empty caption learns from any.
    choosy = [method for method in methods if method.check_captions({""})]
    wrong: list[str] = []
    captions: set[str] = set()
    for sample in samples:
        if (problem := rule.problem(sample.captions, sample.kinds)) is not None:
            wrong.append(f"{sample.picture.name}: {problem}")
        elif not wrong:
            captions |= rule.extremes(sample.captions, sample.kinds, bool(choosy))
    if wrong:
        raise UserError(f"{len(wrong)} of {len(samples)} samples have no usable caption:{_listed(wrong)}")
    for method in choosy:
        if wrong := method.check_captions(captions):
            raise UserError(
                f"{len(wrong)} of {len(captions)} captions lack the token that is to be learned: "
                "write it into them, or set replace to a word that they have"
                + _listed([repr(caption) for caption in wrong])
            )
    if tokenize is None or not (cut := cuts(captions, tokenize, windows)):
        return None
    short = {one.caption: read(one.caption, tokenize) for one in cut} if choosy else {}
    for method in choosy:
        unread = set(method.check_captions({short.get(caption, caption) for caption in captions}))
        if wrong := sorted(repr(caption) for caption, part in short.items() if part in unread):
            raise UserError(
                f"{len(wrong)} of {len(captions)} captions are cut before the token that is to be learned; "
                f"shorten them or raise base.windows:{_listed(wrong)}"
            )
    return told(cut, windows)


class Cut(NamedTuple):
    """A caption that does not fit, and how many of its tokens are cut off."""

    caption: str
    over: int


def room(windows: int) -> int:
    """How many tokens are read of a caption."""
    return (WINDOW - 2) * windows


def cuts(captions: Iterable[str], tokenize: Tokenize, windows: int) -> list[Cut]:
    """All captions that are cut, the longest first.

    Args:
        captions: as they are encoded.
        tokenize: captions -> Tokens of `windows` windows.
    """
    # A token covers a byte at least, so that short captions need no look.
    long = sorted(caption for caption in captions if len(caption.encode()) > room(windows))
    over = _over(long, tokenize)
    found = (Cut(caption, count) for caption, count in zip(long, over, strict=True) if count)
    return sorted(found, key=lambda cut: -cut.over)


def told(found: Sequence[Cut], windows: int) -> str:
    """What a run says of the captions that are cut, one at least: how many, and the longest of them."""
    needed = -(-(found[0].over + room(windows)) // room(1))
    lines = [f"the last {cut.over} of {cut.caption[:60]!r}..." for cut in found]
    return (
        f"{len(found)} captions have more than {room(windows)} tokens and are cut; "
        f"base.windows: {needed} reads them all{_listed(lines)}"
    )


def _listed(lines: Sequence[str]) -> str:
    """The end of a message: some lines, and how many more there are."""
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:SHOWN], *more])


def read(caption: str, tokenize: Tokenize) -> str:
    """What the base reads of a caption, to the last word that fits: the longest beginning that is not cut."""
    ends = [0, *_ends(caption)]
    over = _over([caption[:end] for end in ends], tokenize)
    return caption[: max(end for end, count in zip(ends, over, strict=True) if not count)]


def _ends(text: str) -> Iterator[int]:
    """Where a text may be cut without parting a word: at its end, and beside all that is no letter."""
    for match in re.finditer(r"\w+|\W", text):
        yield match.end()


def _over(captions: Sequence[str], tokenize: Tokenize) -> list[int]:
    """For each caption how many tokens do not fit, by the text encoder that reads the least of it."""
    counts: list[int] = []
    for start in range(0, len(captions), AT_ONCE):
        each = tokenize(captions[start : start + AT_ONCE]).each()
        counts += [max(both) for both in zip(*(tokens.cut for tokens in each), strict=True)]
    return counts
