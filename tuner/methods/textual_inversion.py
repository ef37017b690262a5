"""Textual Inversion: new rows of the text encoders' input embeddings, and nothing else (arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from tuner.block import Block
from tuner.errors import UserError
from tuner.export import embedding
from tuner.export.files import save
from tuner.export.metadata import Kind
from tuner.family import Family
from tuner.method import Card, Method
from tuner.text import Text, Tokens


class Config(Block):
    """The recipe's block."""

    token: str = Field(description="the new word, as prompts will write it, for instance <toy>")
    init: str = Field(description="a known word of one token whose vector the new rows start from")
    vectors: int = Field(1, ge=1, le=75, description="rows the new word stands for")
    replace: str | None = Field(None, description="a word of the captions that the token takes the place of")


class TextualInversion(Method):
    """The new rows stand beside each frozen table as a parameter of their own; no table has a gradient."""

    kind: ClassVar[Kind] = "textual_inversion"
    CACHES_TEXT: bool = False

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        tables = {encoder: family.embedding(encoder).weight for encoder in family.text_encoders}
        starts = self._starts(config, family)
        self.names = [config.token] + [f"{config.token}_{n}" for n in range(1, config.vectors)]
        ids = family.add_tokens(self.names)
        for encoder, table in tables.items():
            assert ids[encoder] == list(range(len(table), len(table) + config.vectors)), ids
        self.rows = nn.ParameterDict(  # by text encoder [n, D]
            {
                encoder: nn.Parameter(table[starts[encoder]].detach().float().repeat(config.vectors, 1))
                for encoder, table in tables.items()
            }
        )
        self.start = {encoder: rows.detach().clone() for encoder, rows in self.rows.items()}
        self._off = False

    @staticmethod
    def _starts(config: Config, family: Family) -> dict[str, int]:
        """The id of the initial word for each text encoder."""
        starts = {}
        for encoder, tokens in zip(family.text_encoders, family.tokenize([config.init]).each(), strict=True):
            count = int(tokens.ends[0, 0]) - 1
            if count != 1:
                raise UserError(
                    f"method.textual_inversion.init: {config.init!r} is {count} tokens of the base, "
                    "expected one"
                )
            starts[encoder] = int(tokens.ids[0, 0, 1])
        return starts

    def replacements(self) -> tuple[tuple[str, str], ...]:
        """The token in place of `replace`, and all its rows in place of the token."""
        own = [(self.config.replace, self.config.token)] if self.config.replace is not None else []
        many = [(self.config.token, " ".join(self.names))] if len(self.names) > 1 else []
        return tuple(own + many)

    def labels(self) -> dict[str, Any]:
        return {"trigger_phrase": self.config.token}

    def check_captions(self, captions: set[str]) -> list[str]:
        """The captions in which the token is missing."""
        return sorted(caption for caption in captions if self.config.token not in caption)

    def encode(self, family: Family, tokens: Tokens) -> Text:
        rows: Mapping[str, Tensor] = dict(self.rows.items())
        if self._off:
            rows = {encoder: start.to(rows[encoder].device) for encoder, start in self.start.items()}
        return family.encode_prompts(tokens, rows)

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """The token reads as the initial word."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """One file named for the token, with one tensor [n, D], or one for each of two text encoders."""
        tensors = card.cast(embedding.to_file(self.config.token, *self.rows.values()))
        return [
            save(folder / embedding.file_name(self.config.token), tensors, card.header(self.kind, tensors))
        ]


METHOD = TextualInversion
