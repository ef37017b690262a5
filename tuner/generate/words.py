"""New words from files of vectors (Textual Inversion, arXiv 2208.01618), as prompts may use them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export import contents as reading
from tuner.export import embedding
from tuner.family import Family
from tuner.progress import say
from tuner.text import Text

_NAMELESS = ("emb_params", "*")
"""Keys that tools give to vectors whose word is the file's name."""


class Words:
    """The words of some files, read by a family beside its own.

    Attributes:
        spelled: word -> what stands in its place in the prompt that is tokenised, one name for each vector.
    """

    def __init__(self, family: Family, paths: Sequence[Path]) -> None:
        """Add the words to the family's tokenisers.

        Raises:
            UserError: a file holds no such vectors or not those of this base, or two have the same word.
        """
        self.family = family
        self.spelled: dict[str, str] = {}
        rows: dict[str, list[Tensor]] = {encoder: [] for encoder in family.text_encoders}
        for number, path in enumerate(paths):
            word, vectors = _read(path, family)
            if word in self.spelled:
                raise UserError(f"--embedding {path.name}: the word {word} is another file's already")
            count = len(next(iter(vectors.values())))
            # Names that no prompt holds: the word itself may be one that the base knows.
            names = [f"<embedding-{number}-{i}>" for i in range(count)]
            for encoder, ids in family.add_tokens(names).items():
                first = family.embedding(encoder).num_embeddings + sum(map(len, rows[encoder]))
                assert ids == list(range(first, first + count)), (encoder, ids)
                rows[encoder].append(vectors[encoder])
            self.spelled[word] = " ".join(names)
            say(f"{path.name}: the word {word}, {count} vector{'s' if count > 1 else ''}")
        self.rows = {encoder: torch.cat(parts) for encoder, parts in rows.items() if parts}

    def final(self, prompt: str) -> str:
        """A prompt with the vectors' names in place of the words."""
        if not self.spelled:
            return prompt
        longest_first = sorted(self.spelled, key=len, reverse=True)
        either = "|".join(_whole(word) for word in longest_first)
        return re.sub(either, lambda match: self.spelled[match[0]], prompt)

    def check(self, prompts: Sequence[str]) -> None:
        """Raises UserError where no prompt has one of the words."""
        for word in self.spelled:
            if not any(re.search(_whole(word), prompt) for prompt in prompts):
                raise UserError(f"--embedding: no prompt has the word {word}, so it has no effect")

    def encode(self, prompt: str, what: str) -> Text:
        """A prompt as the denoiser reads it, a batch of one; says how much of it was cut, if any.

        Args:
            what: the prompt's name in that message.
        """
        tokens = self.family.tokenize([self.final(prompt)])
        for each in tokens.each():
            if each.cut[0]:
                needed = -(-(each.cut[0] + 75 * each.ids.shape[1]) // 75)
                say(f"{what}: its last {each.cut[0]} tokens are cut; --windows {needed} reads them all")
                break
        rows = {encoder: table.to(self.family.device) for encoder, table in self.rows.items()}
        return self.family.encode_prompts(tokens.to(self.family.device), rows)


def _whole(word: str) -> str:
    """A regular expression for the word where it is not a part of a longer one."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return f"{before}{re.escape(word)}{after}"


def _read(path: Path, family: Family) -> tuple[str, dict[str, Tensor]]:
    """A file's word, and its vectors [n, D] for each of the family's text encoders."""
    encoders = list(family.text_encoders)
    try:
        tables = embedding.from_file(path, [family.embedding(name).embedding_dim for name in encoders])
    except UserError as error:
        raise UserError(f"--embedding for {family.title} ({family.name}): {error}") from error
    keys = list(reading.read(path).shapes)
    named = len(encoders) == 1 and keys[0] not in _NAMELESS
    return (keys[0] if named else path.stem), dict(zip(encoders, tables, strict=True))
