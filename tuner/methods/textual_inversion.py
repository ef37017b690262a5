"""Textual Inversion: new rows of the text encoder's input embedding, and nothing else (arXiv 2208.01618)."""

from __future__ import annotations

from collections.abc import Iterator
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
    """The new rows stand beside the frozen table as a parameter of their own; the table has no gradient."""

    kind: ClassVar[Kind] = "textual_inversion"
    CACHES_TEXT: bool = False

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        (self.encoder,) = family.text_encoders
        table = family.embedding(self.encoder).weight
        start = self._start(config, family)
        names = [config.token] + [f"{config.token}_{n}" for n in range(1, config.vectors)]
        ids = family.add_tokens(names)
        assert ids == list(range(table.shape[0], table.shape[0] + config.vectors)), ids
        self.names = names
        self.rows = nn.Parameter(table[start].detach().float().repeat(config.vectors, 1))  # [n, D]
        self.start = self.rows.detach().clone()
        self._rows: Tensor | None = None

    @staticmethod
    def _start(config: Config, family: Family) -> int:
        """The id of the initial word."""
        tokens = family.tokenize([config.init])
        count = int(tokens.ends[0, 0]) - 1
        if count != 1:
            raise UserError(
                f"method.textual_inversion.init: {config.init!r} is {count} tokens of the base, expected one"
            )
        return int(tokens.ids[0, 0, 1])

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
        return family.encode_prompts(tokens, self.rows if self._rows is None else self._rows)

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """The token reads as the initial word."""
        self._rows = self.start.to(self.rows.device)
        try:
            yield
        finally:
            self._rows = None

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """One file named for the token, with one tensor [n, D]."""
        tensors = card.cast(embedding.to_file(self.config.token, self.rows.detach()))
        return [
            save(folder / embedding.file_name(self.config.token), tensors, card.header(self.kind, tensors))
        ]


METHOD = TextualInversion
