"""What the CLIP text encoders of every family share: windows, cutting, new rows, pooling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WINDOW = 77
"""Positions of a CLIP text encoder, the start and end tokens included (arXiv 2103.00020, section 2.4)."""


class Tokens(NamedTuple):
    """Captions as CLIP reads them."""

    ids: Tensor  # [B, W, 77] int64, W windows
    ends: Tensor  # [B, W] int64, the position of the first end-of-text token
    cut: tuple[int, ...]  # for each caption, how many of its tokens did not fit

    def to(self, device: torch.device) -> Tokens:
        return Tokens(
            self.ids.to(device, non_blocking=True), self.ends.to(device, non_blocking=True), self.cut
        )


class Text(NamedTuple):
    """Encoded captions."""

    hidden: Tensor  # [B, S, D]
    pooled: Tensor | None = None  # [B, P]

    def to(self, device: torch.device) -> Text:
        pooled = None if self.pooled is None else self.pooled.to(device, non_blocking=True)
        return Text(self.hidden.to(device, non_blocking=True), pooled)


def tokenize(tokenizer: Any, captions: Sequence[str]) -> Tokens:
    """Tokenise captions into one window each, as the diffusers pipelines do (padded with the pad token).

    Returns:
        Tokens with W = 1; what lies behind the 75th token of a caption is cut and counted.
    """
    rows, ends, cut = [], [], []
    for caption in captions:
        inner = tokenizer(caption, add_special_tokens=False)["input_ids"]
        kept = inner[: WINDOW - 2]
        row = [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (WINDOW - len(row)))
        ends.append(len(row) - 1)
        cut.append(len(inner) - len(kept))
    ids = torch.tensor(rows, dtype=torch.int64).reshape(-1, 1, WINDOW)
    return Tokens(ids, torch.tensor(ends, dtype=torch.int64).reshape(-1, 1), tuple(cut))


@contextmanager
def extra_rows(embedding: nn.Embedding, rows: Tensor | None) -> Iterator[None]:
    """Let ids behind the embedding's table read from `rows`, differentiably, while the table stays frozen.

    Args:
        embedding: the input embedding [V, D] of a text encoder.
        rows: [n, D]; id V + i reads rows[i]. None changes nothing.
    """
    if rows is None:
        yield
        return
    size = embedding.num_embeddings
    seen: list[Tensor] = []  # the ids of the call under way

    def clamp(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0].clamp(max=size - 1),)

    def replace(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = seen.pop()
        taken = rows[(ids - size).clamp(min=0)].to(output.dtype)
        return torch.where((ids >= size).unsqueeze(-1), taken, output)

    handles = [embedding.register_forward_pre_hook(clamp), embedding.register_forward_hook(replace)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pool(hidden: Tensor, ends: Tensor) -> Tensor:
    """The hidden state at the true end-of-text token: [B, S, D], [B] -> [B, D].

    A text encoder whose config says `eos_token_id: 2` pools at the highest id instead, which is a newly
    added token; the position is therefore taken from the tokeniser.
    """
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), ends]
