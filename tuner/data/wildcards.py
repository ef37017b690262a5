"""Wildcards of captions: `{red|blue}` becomes one of its options.

Options may hold wildcards in their turn and may be empty (`{big |}toy`). Braces without a bar between them
(`{}`, `{red}`) and a lone brace or bar are text like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product


@dataclass(frozen=True)
class Wildcard:
    """A choice inside a text: where its brace opens, which names it, and its options, two at least."""

    at: int
    options: tuple[Parts, ...]


Parts = tuple[str | Wildcard, ...]
"""A text in its order: plain pieces and wildcards."""


def parse(text: str) -> Parts:
    """A text with its wildcards found."""
    starts = [-1]
    opened: list[list[list[str | Wildcard]]] = [[[]]]  # for each open brace, its options as far as they came
    for at, letter in enumerate(text):
        inside = len(opened) > 1
        if letter == "{":
            starts.append(at)
            opened.append([[]])
        elif letter == "|" and inside:
            opened[-1].append([])
        elif letter == "}" and inside:
            start, options = starts.pop(), opened.pop()
            if len(options) > 1:
                opened[-1][-1].append(Wildcard(start, tuple(_merged(option) for option in options)))
            else:
                opened[-1][-1] += ["{", *options[0], "}"]
        else:
            opened[-1][-1].append(letter)
    while len(opened) > 1:  # a brace that nothing closes
        first, *others = opened.pop()
        opened[-1][-1] += ["{", *first]
        for option in others:
            opened[-1][-1] += ["|", *option]
    return _merged(opened[0][0])


def write(parts: Parts, pick: Callable[[Wildcard], int]) -> str:
    """The text with the option that `pick` names in place of each wildcard; it sees no other ones."""
    return "".join(part if isinstance(part, str) else write(part.options[pick(part)], pick) for part in parts)


def count(parts: Parts) -> int:
    """How many ways there are to write a text; two of them may read the same."""
    ways = 1
    for part in parts:
        if isinstance(part, Wildcard):
            ways *= sum(count(option) for option in part.options)
    return ways


def every(parts: Parts) -> Iterator[str]:
    """Every way to write a text, `count` of them."""
    choices = [
        [part] if isinstance(part, str) else [text for option in part.options for text in every(option)]
        for part in parts
    ]
    return ("".join(chosen) for chosen in product(*choices))


def cover(parts: Parts) -> Iterator[str]:
    """Some ways to write a text: each option at least once, and all wildcards together at their nth."""
    paths = list(_paths(parts, {}))
    for path in paths:
        yield write(parts, partial(_along, path))
    for number in range(1 + max((max(path.values()) for path in paths), default=0)):
        yield write(parts, partial(_nth, number))


def _along(path: Mapping[int, int], wildcard: Wildcard) -> int:
    return path.get(wildcard.at, 0)


def _nth(number: int, wildcard: Wildcard) -> int:
    return number % len(wildcard.options)


def _paths(parts: Parts, above: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """For each option of each wildcard, inner ones too, the picks that lead to it."""
    for part in parts:
        if isinstance(part, Wildcard):
            for number, option in enumerate(part.options):
                path = {**above, part.at: number}
                yield path
                yield from _paths(option, path)


def _merged(pieces: list[str | Wildcard]) -> Parts:
    """The same with plain pieces that follow one another joined."""
    merged: list[str | Wildcard] = []
    for piece in pieces:
        if isinstance(piece, str) and merged and isinstance(merged[-1], str):
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)
