"""Which caption a sample gets: chosen, put in a template, prefixed, dropped; all counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tuner import counted


@dataclass(frozen=True)
class CaptionRule:
    """How a sample's captions become the one it is trained with.

    Attributes:
        choose: `any` of the sample's captions with equal chances, or the `first`.
        templates: sentences with one {}; one is drawn and the caption put in.
        prefix: put before the caption.
        drop: the chance that the caption is replaced by the empty one.
        replace: words and what the method puts in their place, in this order.
    """

    choose: str = "any"
    templates: tuple[str, ...] = ()
    prefix: str = ""
    drop: float = 0.0
    replace: tuple[tuple[str, str], ...] = ()

    def final(self, caption: str) -> str:
        """A caption or prompt with the method's words in place; doing it again changes nothing."""
        for number, (word, other) in enumerate(self.replace):
            # What stands there already (`<toy>` for `toy`) is matched first and stays.
            done = sorted({made for _, made in self.replace[number:] if word in made}, key=len, reverse=True)
            before = r"(?<!\w)" if re.match(r"\w", word) else ""
            either = "|".join([*map(re.escape, done), rf"(?P<word>{before}{re.escape(word)}(?!\w))"])
            caption = re.sub(either, partial(_put, other), caption)
        return caption

    def __call__(self, captions: Sequence[str], seed: int, epoch: int, position: int) -> str:
        """The caption of the sample at `position` of `epoch`."""
        if self.drop > 0 and counted.uniform(seed, epoch, position, "drop caption") < self.drop:
            return ""
        which = 0
        if self.choose == "any" and len(captions) > 1:
            which = counted.choice(len(captions), seed, epoch, position, "choose caption")
        template = "{}"
        if self.templates:
            template = self.templates[
                counted.choice(len(self.templates), seed, epoch, position, "choose template")
            ]
        return self.final(self.prefix + template.replace("{}", captions[which]))

    def every(self, captions: Sequence[str]) -> set[str]:
        """Everything that may come out for a sample with these captions."""
        chosen = captions if self.choose == "any" else captions[:1]
        out = {
            self.final(self.prefix + t.replace("{}", c)) for c in chosen for t in self.templates or ("{}",)
        }
        return out | {""} if self.drop > 0 else out


def _put(other: str, match: re.Match[str]) -> str:
    """What takes the place of a match: `other` for the word, itself for what stands there already."""
    return other if match["word"] else match[0]
