"""What is looked at in a sample that passes once: its header and its captions, before it is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tuner.data import caption_check, conditions, pictures
from tuner.data.caption_check import Tokenize
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.samples import Sample
from tuner.errors import UserError
from tuner.method import Method


class UnusableError(UserError):
    """A sample that may be left out."""


class Looked(NamedTuple):
    """What is known of a sample that can be used.

    Attributes:
        height, width: of its picture, in pixels, as its header says.
        cut: what is said of captions that are longer than the base reads; None: they are read whole.
        frames: of the picture, or pages; the first is used.
    """

    height: int
    width: int
    cut: str | None
    frames: int = 1


@dataclass(frozen=True)
class Gate:
    """What samples have to have; goes to the loading process.

    Attributes:
        conditions: of each source how conditions are made; None: none are wanted.
        rules: of each source that of its captions.
        tokenize: captions -> Tokens of `windows` windows; None: nothing reads them.
    """

    reading: pictures.Reading
    conditions: Sequence[Condition | None]
    rules: Sequence[CaptionRule]
    methods: Sequence[Method]
    tokenize: Tokenize | None
    windows: int

    def __call__(self, sample: Sample) -> Looked:
        """Look at a sample; its picture is not decoded.

        Raises:
            UnusableError: its picture is none, or its condition is missing.
            UserError: its weight is 0, its captions cannot be learned from.
        """
        name, how = sample.picture.name, self.conditions[sample.source]
        if how is not None and how.kind == conditions.GIVEN and sample.condition is None:
            raise UnusableError(f"{name}: no conditioning_image, which condition: image asks for")
        try:
            about = pictures.facts(sample.picture.read(), name, self.reading)
        except UserError as error:
            raise UnusableError(str(error)) from error
        if not sample.weight:
            raise UserError(f"{name}: its weight is 0: it would never count; leave it out")
        return Looked(about.height, about.width, self._captions(sample), about.frames)

    def _captions(self, sample: Sample) -> str | None:
        """What `caption_check.check` tells, of one sample."""
        rule, name = self.rules[sample.source], sample.picture.name
        if problem := rule.problem(sample.captions, sample.kinds):
            raise UserError(f"{name}: {problem}")
        # What learns from the empty caption learns from any.
        choosy = [method for method in self.methods if _lacks(method, "")]
        captions = rule.extremes(sample.captions, sample.kinds, bool(choosy))
        for caption in sorted(captions):
            if any(_lacks(method, caption) for method in choosy):
                raise UserError(f"{name}: its caption {caption!r} lacks the token that is to be learned")
        if self.tokenize is None or not (found := caption_check.cuts(captions, self.tokenize, self.windows)):
            return None
        for one in found if choosy else ():
            short = caption_check.read(one.caption, self.tokenize)
            if any(_lacks(method, short) for method in choosy):
                raise UserError(
                    f"{name}: its caption {one.caption!r} is cut before the token that is to be learned; "
                    "shorten it or raise base.windows"
                )
        return f"{name}: the last {found[0].over} tokens of {found[0].caption[:60]!r}..."


def _lacks(method: Method, caption: str) -> bool:
    """Whether a method cannot learn from a caption; one of several words is enough."""
    try:
        return bool(method.check_captions({caption}))
    except UserError:  # some of its words are there, others are not
        return False
