"""Which caption a sample gets: chosen, changed by one operator after the other, or dropped; all counted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tuner import counted
from tuner.data import wildcards
from tuner.data.tags import TagRule
from tuner.data.wildcards import Wildcard
from tuner.errors import UserError

MANY = 4096
"""Texts that a single sample's caption may become, beyond which they are not listed."""
SPELLINGS = 256
"""Ways to write a caption's wildcards, beyond which only some are looked at in advance."""


@dataclass(frozen=True)
class CaptionRule:
    """How a sample's captions become the one it is trained with, in this order:

    caption dropout, choose, wildcards, tag dropout, tag shuffle, template, trigger, prefix, suffix,
    new words.

    Attributes:
        choose: `any` of the sample's captions with equal chances, the `first`, or weights: by position
            (captions without one are never chosen), or by kind (captions of a kind share its weight evenly;
            kinds without one are never chosen). The weights that a sample has captions for count.
        templates: sentences with one {}; one is drawn and the caption put in.
        prefix: put before the caption.
        drop: the chance that the caption is replaced by the empty one.
        replace: words and what the method puts in their place, in this order.
        suffix: put behind the caption.
        trigger: a word put before the caption and a comma, where the caption has it not.
        wildcards: what becomes of `{a|b}`: `keep` as it is, `draw` one, or always the `first`.
        tags: what happens to a caption's tags; None: it is no list of tags.
    """

    choose: str | Mapping[str, float] | tuple[float, ...] = "any"
    templates: tuple[str, ...] = ()
    prefix: str = ""
    drop: float = 0.0
    replace: tuple[tuple[str, str], ...] = ()
    suffix: str = ""
    trigger: str | None = None
    wildcards: str = "keep"
    tags: TagRule | None = None

    def plain(self) -> CaptionRule:
        """The same for looking instead of training: nothing is drawn, nothing dropped, moved or framed."""
        tags = None if self.tags is None else replace(self.tags, shuffle=False, drop=0.0)
        spelled = "keep" if self.wildcards == "keep" else "first"
        return replace(self, choose="first", templates=(), drop=0.0, wildcards=spelled, tags=tags)

    def final(self, caption: str) -> str:
        """A caption or prompt with the method's words in place; doing it again changes nothing."""
        for number, (word, other) in enumerate(self.replace):
            # What stands there already (`<toy>` for `toy`) is matched first and stays.
            done = sorted({made for _, made in self.replace[number:] if word in made}, key=len, reverse=True)
            either = "|".join([*map(re.escape, done), rf"(?P<word>{_whole(word)})"])
            caption = re.sub(either, partial(_put, other), caption)
        return caption

    def __call__(
        self, captions: Sequence[str], seed: int, epoch: int, position: int, kinds: Sequence[str] = ()
    ) -> str:
        """The caption of the sample at `position` of `epoch`; see `trace`."""
        return self.trace(captions, seed, epoch, position, kinds)[-1][1]

    def trace(
        self, captions: Sequence[str], seed: int, epoch: int, position: int, kinds: Sequence[str] = ()
    ) -> list[tuple[str, str]]:
        """How a sample's caption comes about: each operator that is on, and the text that it left.

        Args:
            captions: the sample's, one at least.
            kinds: what kind each of them is (long, short ...); empty where that is not known.

        Raises:
            UserError: `problem` has something to say.
        """
        at = (seed, epoch, position)
        if self.drop > 0 and counted.uniform(*at, "drop caption") < self.drop:
            return [("caption dropout", "")]
        text = captions[self._chosen(captions, kinds, *at)]
        steps = [("choose", text)]
        if self.wildcards != "keep":
            text = wildcards.write(wildcards.parse(text), partial(self._pick, *at))
            steps.append(("wildcards", text))
        if self.tags is not None:
            steps += self.tags.steps(text, *at)
            text = steps[-1][1]
        template = None
        if self.templates:
            template = self.templates[counted.choice(len(self.templates), *at, "choose template")]
        return steps + list(self._framed(text, template))

    def problem(self, captions: Sequence[str], kinds: Sequence[str] = ()) -> str | None:
        """Why none of a sample's captions can be chosen; None where one can."""
        if not captions:
            return "expected a caption, found none"
        if kinds and len(kinds) != len(captions):
            return f"expected a kind for each of {len(captions)} captions, found {len(kinds)}"
        if any(self._weights(captions, kinds)):
            return None
        if not isinstance(self.choose, Mapping):
            return f"found {len(captions)} captions, of which none has a weight above 0"
        wanted = ", ".join(kind for kind, weight in self.choose.items() if weight > 0)
        return f"expected a caption of kind {wanted}, found {', '.join(kinds) or 'captions without kinds'}"

    def every(self, captions: Sequence[str], kinds: Sequence[str] = ()) -> set[str] | None:
        """Everything that may come out for a sample with these captions; None where that is above MANY."""
        many = 0
        found: set[str] = {""} if self.drop > 0 else set()
        for caption in self._choosable(captions, kinds):
            if self.wildcards == "draw" and wildcards.count(wildcards.parse(caption)) > MANY:
                return None
            for text in self._spelled(caption, MANY):
                many += (1 if self.tags is None else self.tags.count(text)) * max(1, len(self.templates))
                if many > MANY:
                    return None
                found |= self._all_framed([text] if self.tags is None else self.tags.every(text))
        return found

    def extremes(self, captions: Sequence[str], kinds: Sequence[str] = (), ends: bool = True) -> set[str]:
        """Some of what may come out, that tells what all of it has and how long it is: `every` without tags.

        Of tags it has the shortest and the longest captions, with `ends` also each tag at the end. Of a
        caption whose wildcards can be written in more than SPELLINGS ways it has each option, not each way.
        """
        found: set[str] = {""} if self.drop > 0 else set()
        for caption in self._choosable(captions, kinds):
            for text in self._spelled(caption, SPELLINGS):
                found |= self._all_framed([text] if self.tags is None else self.tags.extremes(text, ends))
        return found

    def _framed(self, text: str, template: str | None) -> Iterator[tuple[str, str]]:
        """The operators behind the tags."""
        if template is not None:
            text = template.replace("{}", text)
            yield "template", text
        if self.trigger is not None:
            if re.search(_whole(self.trigger), text) is None:
                text = f"{self.trigger}, {text}" if text else self.trigger
            yield "trigger", text
        if self.prefix:
            text = self.prefix + text
            yield "prefix", text
        if self.suffix:
            text += self.suffix
            yield "suffix", text
        if self.replace:
            yield "new words", self.final(text)

    def _all_framed(self, texts: Iterable[str]) -> set[str]:
        """What the operators behind the tags make of some texts, with every template."""
        found = set()
        for text in texts:
            for template in self.templates or (None,):
                found.add([("", text), *self._framed(text, template)][-1][1])
        return found

    def _spelled(self, caption: str, most: int) -> set[str]:
        """The ways to write a caption's wildcards: all of them up to `most`, else a part that covers them."""
        if self.wildcards == "keep":
            return {caption}
        parts = wildcards.parse(caption)
        if self.wildcards == "first":
            return {wildcards.write(parts, lambda _: 0)}
        return set(wildcards.every(parts) if wildcards.count(parts) <= most else wildcards.cover(parts))

    def _pick(self, seed: int, epoch: int, position: int, wildcard: Wildcard) -> int:
        """Which option of a wildcard comes."""
        if self.wildcards == "first":
            return 0
        return counted.choice(len(wildcard.options), seed, epoch, position, f"wildcard at {wildcard.at}")

    def _weights(self, captions: Sequence[str], kinds: Sequence[str]) -> list[float]:
        """How often each caption is chosen, relative to the others."""
        count = len(captions)
        if self.choose == "any":
            return [1.0] * count
        if isinstance(self.choose, str):
            return [1.0, *[0.0] * (count - 1)]
        if isinstance(self.choose, Mapping):
            of = self.choose
            return [of.get(kind, 0.0) / kinds.count(kind) for kind in kinds] if kinds else [0.0] * count
        return [*self.choose, *[0.0] * count][:count]

    def _chosen(self, captions: Sequence[str], kinds: Sequence[str], *at: int) -> int:
        """Which caption is taken."""
        if problem := self.problem(captions, kinds):
            raise UserError(f"captions: {problem}")
        if self.choose == "first" or len(captions) == 1:
            return 0
        options = len(captions) if self.choose == "any" else self._weights(captions, kinds)
        seed, epoch, position = at
        return counted.choice(options, seed, epoch, position, "choose caption")

    def _choosable(self, captions: Sequence[str], kinds: Sequence[str]) -> list[str]:
        """The captions that may be chosen."""
        if problem := self.problem(captions, kinds):
            raise UserError(f"captions: {problem}")
        return [c for c, w in zip(captions, self._weights(captions, kinds), strict=True) if w > 0]


def joined(found: Iterable[set[str] | None], most: int) -> set[str] | None:
    """What may come out for several samples, from what `every` says of each; None where it is above `most`.

    Stops at the first sample that goes beyond, so that it takes no more room than that.
    """
    every: set[str] = set()
    for texts in found:
        if texts is None:
            return None
        every |= texts
        if len(every) > most:
            return None
    return every


def _whole(word: str) -> str:
    """A pattern of a word that is no part of another one."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    return rf"{before}{re.escape(word)}(?!\w)"


def _put(other: str, match: re.Match[str]) -> str:
    """What takes the place of a match: `other` for the word, itself for what stands there already."""
    return other if match["word"] else match[0]
