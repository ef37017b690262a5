"""Textual Inversion: new rows of the text encoders' input embeddings, and nothing else (arXiv 2208.01618)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.block import Block, Conflict
from tuner.errors import UserError
from tuner.export import embedding
from tuner.export.files import save
from tuner.export.metadata import Kind
from tuner.family import Family
from tuner.method import Card, Method

RANDOM = "random"
_INIT = (
    "where the rows start: a known word for all of them; as many words as rows, one each; several words for "
    "one row, their mean; a .safetensors file; or random, of the known rows' mean norm"
)
_VECTORS = "rows the new word stands for"
_REPLACE = "a word of the captions that the token takes the place of"

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "object": (
        "a photo of a {}",
        "one {} in the middle of the picture",
        "a close view of a {}",
        "a {} seen from the front",
        "a {} seen from above",
        "a small {} far away",
        "a large {} that fills the picture",
        "a bright photo of a {}",
        "a dark photo of a {}",
        "a blurred photo of a {}",
        "a sharp photo of a {}",
        "a {} on a plain background",
        "a {} on a table",
        "a {} outdoors",
        "a clean {}",
        "an old {}",
        "my {}",
        "this {}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a poster in the style of {}",
        "a detail of a work in the style of {}",
        "a small work in the style of {}",
        "a large work in the style of {}",
        "a bright picture in the style of {}",
        "a dark picture in the style of {}",
        "a quiet scene in the style of {}",
        "a busy scene in the style of {}",
        "a landscape in the style of {}",
        "a portrait in the style of {}",
        "a still life in the style of {}",
    ),
}


class Word(Block):
    """A new word."""

    token: str = Field(description="the new word, as prompts will write it, for instance <toy>")
    init: str = Field(description=_INIT, min_length=1)
    vectors: int = Field(1, ge=1, le=75, description=_VECTORS)
    replace: str | None = Field(None, description=_REPLACE, min_length=1)

    def names(self) -> list[str]:
        """The words that the tokenisers learn, one for each row: <toy>, <toy>_1 ..."""
        return [self.token, *(f"{self.token}_{n}" for n in range(1, self.vectors))]


class Config(Block):
    """The recipe's block."""

    token: str | None = Field(
        None, description="the new word, as prompts will write it, for instance <toy>; several: tokens"
    )
    init: str | None = Field(None, description=_INIT, min_length=1)
    vectors: int = Field(1, ge=1, le=75, description=_VECTORS)
    replace: str | None = Field(None, description=_REPLACE, min_length=1)
    tokens: list[Word] = Field([], description="several new words, each with its own start")
    text_encoders: Literal["all", "first", "second"] = Field(
        "all", description="which text encoders learn the words; in the others their rows stay at the start"
    )
    templates: Literal["none", "object", "style"] = Field(
        "none", description="sentences that a caption, such as the token alone, is put into"
    )
    norm: Literal["free", "kept"] = Field(
        "free", description="kept: after each step every row is brought back to the norm it started with"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="of the new rows, beside another method; train.learning_rate if absent"
    )

    def unused(self) -> dict[str, str]:
        if self.tokens:
            return dict.fromkeys(("token", "init", "vectors", "replace"), "tokens has its own for each word")
        return {"tokens": "there are no several words"} if self.token is not None else {}

    def conflicts(self) -> Iterator[Conflict]:
        """No word, a word without a start, words that are in each other's way."""
        if self.tokens:
            yield from _clashes(self.tokens)
        elif self.token is None:
            yield Conflict(("token", "tokens"), "is missing; expected a new word here, or several in tokens")
        elif self.init is None:
            yield Conflict(("init", "token"), "is missing; expected a known word, a file or random")

    def words(self) -> list[Word]:
        """The new words."""
        if self.tokens:
            return list(self.tokens)
        assert self.token is not None and self.init is not None
        return [Word(token=self.token, init=self.init, vectors=self.vectors, replace=self.replace)]


def _clashes(words: Sequence[Word]) -> Iterator[Conflict]:
    """Words of which one would be read, replaced or filed as another."""
    for i, one in enumerate(words):
        for j, other in enumerate(words):
            key, word = f"tokens.{i}.token", one.replace
            if i < j and one.token.strip("<>").casefold() == other.token.strip("<>").casefold():
                yield Conflict((f"tokens.{j}.token", key), f"found {other.token}, a file's name twice")
            elif i != j and one.token in other.token:
                yield Conflict((f"tokens.{j}.token", key), f"found {other.token}, which holds {one.token}")
            if i < j and word is not None and word == other.replace:
                yield Conflict((f"tokens.{j}.replace", f"tokens.{i}.replace"), f"found {word} again")
            if i != j and word is not None and re.search(rf"(?<!\w){re.escape(word)}(?!\w)", other.token):
                place = (f"tokens.{i}.replace", f"tokens.{j}.token")
                yield Conflict(place, f"found {word}, which stands in the token {other.token}")


class TextualInversion(Method):
    """The new rows stand beside each frozen table as a parameter of their own; no table has a gradient."""

    kind: ClassVar[Kind] = "textual_inversion"
    COMBINES: ClassVar[tuple[str, ...]] = ("lora",)
    CACHES_TEXT: bool = False

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self.words = config.words()
        tables = {encoder: family.embedding(encoder).weight for encoder in family.text_encoders}
        starts = _starts(self.words, family, torch.Generator().manual_seed(seed))
        learning = _learning(config, list(tables))
        self.names = [name for word in self.words for name in word.names()]
        ids = family.add_tokens(self.names)
        for word in self.words:
            embedding.file_name(word.token)  # a token that cannot be exported is a mistake now
        for encoder, table in tables.items():
            assert ids[encoder] == list(range(len(table), len(table) + len(self.names))), ids
        self.encoders = list(tables)
        self.rows = nn.ParameterDict(  # by text encoder [n, D], the words' rows one behind the other
            {encoder: nn.Parameter(starts[encoder].clone()) for encoder in learning}
        )
        for encoder, start in starts.items():
            self.register_buffer(f"start_{encoder}", start, persistent=False)
        self.SETTLES = config.norm == "kept"
        self._off = False

    @classmethod
    def exact(cls, config: Config) -> tuple[str, ...]:
        """Words start from the known rows."""
        return ("text_encoder",)

    def start(self, encoder: str) -> Tensor:
        """Where a text encoder's rows started [n, D]."""
        start: Tensor = getattr(self, f"start_{encoder}")
        return start

    def table(self, encoder: str) -> Tensor:
        """A text encoder's new rows as they are [n, D]; those that do not learn are where they started."""
        return self.rows[encoder] if encoder in self.rows else self.start(encoder)

    def places(self) -> dict[str, slice]:
        """Which rows of the tables belong to a token."""
        found, first = {}, 0
        for word in self.words:
            found[word.token] = slice(first, first + word.vectors)
            first += word.vectors
        return found

    def new_rows(self) -> Mapping[str, Tensor]:
        return {name: self.start(name) if self._off else self.table(name) for name in self.encoders}

    def replacements(self) -> tuple[tuple[str, str], ...]:
        """Each token in place of its `replace`, and all its rows in place of the token."""
        own = [(word.replace, word.token) for word in self.words if word.replace is not None]
        many = [(word.token, " ".join(word.names())) for word in self.words if word.vectors > 1]
        return tuple(own + many)

    def templates(self) -> tuple[str, ...]:
        return TEMPLATES[self.config.templates]

    def labels(self) -> dict[str, Any]:
        return {"trigger_phrase": ", ".join(word.token for word in self.words)}

    def check_captions(self, captions: set[str]) -> list[str]:
        """The captions in which every token is missing.

        Raises:
            UserError: no caption has one of the tokens.
        """
        missing = [w.token for w in self.words if not any(w.token in caption for caption in captions)]
        if missing and len(missing) < len(self.words):
            raise UserError(f"no caption has {' or '.join(missing)}, so that it would learn nothing")
        tokens = [word.token for word in self.words]
        return sorted(caption for caption in captions if not any(token in caption for token in tokens))

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        return [{"params": list(self.rows.values()), "lr": self.config.learning_rate or learning_rate}]

    @torch.no_grad()
    def after_update(self) -> None:
        """With `norm: kept` every row gets the norm that it started with; its direction stays."""
        if self.config.norm == "free":
            return
        for encoder, rows in self.rows.items():
            wanted = self.start(encoder).norm(dim=1, keepdim=True)
            rows.mul_(wanted / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny))

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """The rows' mean norm, and how far they are from their start relative to its norm, on average."""
        norms, ways = [], []
        for encoder, rows in self.rows.items():
            start = self.start(encoder)
            norms.append(rows.norm(dim=1).mean())
            ways.append(((rows - start).norm(dim=1) / start.norm(dim=1).clamp(min=1e-12)).mean())
        return {"row_norm": torch.stack(norms).mean(), "row_drift": torch.stack(ways).mean()}

    def depends(self) -> dict[str, Path]:
        before = "method.textual_inversion.init of "
        return {f"{before}{word.token}": Path(word.init) for word in self.words if _is_file(word.init)}

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """Each token reads as its start."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """One file named for each token, with one tensor [n, D], or one for each of two text encoders."""
        written = []
        for token, place in self.places().items():
            tables = [self.table(encoder)[place] for encoder in self.encoders]
            tensors = card.cast(embedding.to_file(token, *tables))
            path = folder / embedding.file_name(token)
            header = card.header(self.kind, tensors)
            if header:
                header |= self.retold(path, card)
            written.append(save(path, tensors, header))
        return written

    def retold(self, path: Path, card: Card) -> dict[str, str]:
        """Of several words each file names its own."""
        tokens = {embedding.file_name(word.token): word.token for word in self.words}
        return {"modelspec.trigger_phrase": tokens[path.name]} if len(tokens) > 1 else {}


def _learning(config: Config, encoders: list[str]) -> list[str]:
    """The text encoders whose rows are trained.

    Raises:
        UserError: one is asked for that the base has not.
    """
    if config.text_encoders == "all":
        return encoders
    if len(encoders) == 1:
        raise UserError(
            f"method.textual_inversion.text_encoders: {config.text_encoders} has no effect: "
            "the base has one text encoder"
        )
    return [encoders[("first", "second").index(config.text_encoders)]]


def _is_file(init: str) -> bool:
    return Path(init).suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def _starts(words: Sequence[Word], family: Family, drawn: torch.Generator) -> dict[str, Tensor]:
    """The rows [n, D] that all words start with, by text encoder, float32 on the CPU."""
    tables = {name: family.embedding(name).weight.detach().float().cpu() for name in family.text_encoders}
    parts: dict[str, list[Tensor]] = {encoder: [] for encoder in tables}
    for word in words:
        if word.init == RANDOM:
            made = [_random(table, word.vectors, drawn) for table in tables.values()]
        elif _is_file(word.init):
            try:
                made = embedding.from_file(Path(word.init), [table.shape[1] for table in tables.values()])
            except UserError as error:
                raise UserError(f"method.textual_inversion.init: {error}") from error
        else:
            ids = _ids(word, family)
            made = [table[ids[encoder]] for encoder, table in tables.items()]
        for (encoder, part), rows in zip(parts.items(), made, strict=True):
            part.append(_fitted(word, rows, encoder))
    return {encoder: torch.cat(part) for encoder, part in parts.items()}


def _random(table: Tensor, count: int, drawn: torch.Generator) -> Tensor:
    """Rows [count, D] of random directions and the known rows' mean norm."""
    rows = torch.randn(count, table.shape[1], generator=drawn)
    made: Tensor = rows * (table.norm(dim=1).mean() / rows.norm(dim=1, keepdim=True))
    return made


def _fitted(word: Word, rows: Tensor, encoder: str) -> Tensor:
    """As many rows as the word has: its own, one for all, or for one row the mean of several words."""
    if len(rows) == word.vectors:
        return rows
    if len(rows) == 1 and not _is_file(word.init):
        return rows.repeat(word.vectors, 1)
    if word.vectors == 1 and not _is_file(word.init):
        return rows.mean(dim=0, keepdim=True)
    found = "vectors" if _is_file(word.init) else "words"
    one_or = "" if _is_file(word.init) else "1 or "
    raise UserError(
        f"method.textual_inversion.init: {word.init!r} has {len(rows)} {found}, "
        f"but {word.token} has vectors: {word.vectors}; expected {one_or}{word.vectors}"
    )


def _ids(word: Word, family: Family) -> dict[str, list[int]]:
    """The ids of the words in `init`, by text encoder.

    Raises:
        UserError: one of them is not a single token of the base.
    """
    ids: dict[str, list[int]] = {encoder: [] for encoder in family.text_encoders}
    for known in word.init.split():
        read = family.tokenize([known]).each()
        for encoder, tokens in zip(family.text_encoders, read, strict=True):
            count = int(tokens.ends[0, 0]) - 1
            if count != 1:
                raise UserError(
                    f"method.textual_inversion.init: {known!r} is {count} tokens of the base, expected one"
                )
            ids[encoder].append(int(tokens.ids[0, 0, 1]))
    if not word.init.split():
        raise UserError("method.textual_inversion.init: found no word, expected at least one")
    return ids


METHOD = TextualInversion
