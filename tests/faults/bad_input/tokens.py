"""New words that cannot be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bases import PICKLE
from .case import Case, World, case, tensors


def learned(**config: Any) -> Callable[[World], None]:
    return lambda world: world.words_learned(**config)


def from_file(data: bytes, name: str = "start.safetensors") -> Callable[[World], None]:
    def make(world: World) -> None:
        world.file(name, data)
        world.words_learned(init=name)

    return make


def two_words(world: World) -> None:
    words = [{"token": "<toy>", "init": "toy", "replace": "toy"}, {"token": "<hat>", "init": "red"}]
    world.method("textual_inversion", tokens=words)


def cut(world: World) -> None:
    """The word comes behind what the base reads of a caption."""
    world.pictures(
        4,
        caption="a very long caption of a thing that is described at length, "
        + "and then some more, " * 9
        + "toy",
    )
    world.words_learned()


def one_without(world: World) -> None:
    world.file("data/2.txt", "a red hat")
    world.words_learned()


def bundled(world: World) -> None:
    world.words_learned(token="<a.b>")
    world.set("method.lora", {"rank": 2})


WIDE = tensors({"toy": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 32]}}, b"\0" * 32)
LIES = tensors({"toy": {"dtype": "F32", "shape": [1, 32], "data_offsets": [0, 128]}}, b"\0" * 32)

TOKENS: list[Case] = [
    case("known already", learned(token="red"), "method.textual_inversion.token",
         "red is in the base's vocabulary already", "choose another"),
    case("start of several tokens", learned(init="elephant"),
         "textual_inversion.init: 'elephant' is 8 tokens", "expected one"),
    case("no start", learned(init=None), "textual_inversion.init: is missing", "random"),
    case("an empty word", learned(token=""), "token ''", "expected one word"),
    case("a path for a word", learned(token="../toy"), "token '../toy' cannot name a file",
         "letters, digits"),
    case("a word with a space", learned(token="my toy"), "token 'my toy' cannot name a file",
         "expected one word"),
    case("never used", learned(replace=None),
         "1 of 1 captions lack the token that is to be learned: write it into them", "'a red toy'"),
    case("one caption without", one_without, "1 of 2 captions lack the token", "'a red hat'", "set replace"),
    case("one of two never used", two_words, "no caption has <hat>", "it would learn nothing"),
    case("not read", cut, "captions are cut before the token that is to be learned", "raise base.windows"),
    case("vectors and words", learned(init="red toy", vectors=3), "init: 'red toy' has 2 words",
         "expected 1 or 3"),
    case("no such start", learned(init="gone.safetensors"),
         "textual_inversion.init: gone.safetensors: no such file", "gone"),
    case("a pickle to start", from_file(PICKLE, "start.pt"), "start.pt: a pickle, which can run any code",
         "expected a .safetensors"),
    case("a start of another width", from_file(WIDE), "start.safetensors: toy is [1, 8]", "[n, 32]"),
    case("a start that lies", from_file(LIES), "textual_inversion.init: start.safetensors: not a whole",
         "start.safetensors"),
    case("a dot in a bundle", bundled, "token <a.b>: a dot", "the name of a word that lies in a bundle"),
    case("too many rows", learned(vectors=99), "textual_inversion.vectors: found the number 99",
         "at most 75"),
]  # fmt: skip
