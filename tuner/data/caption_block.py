"""The recipe's block of captions: what is asked for; captions.py says in which order it is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tuner.block import Block, Conflict
from tuner.data import wildcards

if TYPE_CHECKING:
    from tuner.data.captions import CaptionRule

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Tags(Block):
    """What happens to the tags of a caption; afterwards they are joined by the separator and a space."""

    shuffle: bool = Field(False, description="put the tags in another order each time")
    drop: Share = Field(0.0, description="chance of each tag to be left out, 0 to 1")
    separator: Text = Field(",", description="what stands between two tags")
    keep: Annotated[int, Field(ge=0)] = Field(
        0, description="tags in front that are neither moved nor dropped"
    )
    marker: Text | None = Field(
        None,
        description="for instance '|||': what stands before the first and behind the second in a caption is "
        "neither moved nor dropped, whatever keep says; the marker is taken out",
    )
    together: Text | None = Field(
        None, description="for instance ';;;': joins tags that are moved and dropped as one"
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Nothing to do; marks that would be taken for one another."""
        if not self.shuffle and not self.drop:
            yield Conflict(("shuffle", "drop"), "found neither shuffle nor drop, expected one of them")
        if self.marker is not None and self.marker in self.separator:
            yield Conflict(("marker", "separator"), f"found '{self.marker}', which is in the separator")
        if self.together is not None and _alike(self.together, self.separator):
            yield Conflict(
                ("together", "separator"), f"found '{self.together}' beside separator '{self.separator}'"
            )
        if self.together is not None and self.marker is not None and _alike(self.together, self.marker):
            yield Conflict(("together", "marker"), f"found '{self.together}' beside marker '{self.marker}'")


class Captions(Block):
    """How the captions of a picture become the one it is trained with."""

    drop: Share | None = Field(
        None, description="share of captions made empty, 0 to 1; null: the method's own"
    )
    prefix: str = Field("", description="text put before every caption")
    templates: list[str] = Field([], description="sentences with one {} each, where the caption is put in")
    choose: Literal["any", "first"] | dict[str, Weight] | list[Weight] = Field(
        "any",
        description="which of a picture's several captions; or weights, by kind ({long: 95, short: 5}) or by "
        "position ([95, 5]), of which those count that a picture has captions for",
    )
    wildcards: bool = Field(
        False, description="{red|blue} in a caption becomes one of its options; may be nested"
    )
    tags: Tags | None = Field(None, description="captions are lists of tags; null: they are sentences")
    trigger: Text | None = Field(
        None, description="word put before a caption and its template where they have it not, with a comma"
    )
    suffix: str = Field("", description="text put behind every caption")

    def rule(
        self, templates: tuple[str, ...], drop: float, words: tuple[tuple[str, str], ...]
    ) -> CaptionRule:
        """What is asked for, as it is done.

        Args:
            templates: of the methods, where the recipe has none.
            drop: the methods' share of captions made empty, where the recipe has none.
            words: the methods' words and what they put in their place.
        """
        from tuner.data.captions import CaptionRule  # here, because a recipe is read without numpy
        from tuner.data.tags import TagRule

        return CaptionRule(
            tuple(self.choose) if isinstance(self.choose, list) else self.choose,
            tuple(self.templates) or templates,
            self.prefix,
            drop if self.drop is None else self.drop,
            words,
            self.suffix,
            self.trigger,
            "draw" if self.wildcards else "keep",
            None if self.tags is None else TagRule(**self.tags.resolved()),
        )

    def conflicts(self) -> Iterator[Conflict]:
        """Templates without a place for the caption, or with several; no weights; wildcards elsewhere."""
        for i, template in enumerate(self.templates):
            if (count := template.count("{}")) != 1:
                yield Conflict(
                    (f"templates.{i}",), f"found {count} times {{}} in '{template}', expected it once"
                )
        if not isinstance(self.choose, str):
            weights = self.choose.values() if isinstance(self.choose, dict) else self.choose
            if not any(weights):
                yield Conflict(("choose",), "found no weight above 0, expected one at least")
        if self.wildcards:
            texts = {f"templates.{i}": template for i, template in enumerate(self.templates)}
            texts |= {"prefix": self.prefix, "suffix": self.suffix, "trigger": self.trigger or ""}
            for key, text in texts.items():
                if any(isinstance(part, wildcards.Wildcard) for part in wildcards.parse(text)):
                    yield Conflict(
                        (key, "wildcards"),
                        f"found a wildcard in '{text}', but they are read in captions only; "
                        "write several templates",
                    )


def _alike(one: str, other: str) -> bool:
    return one in other or other in one
