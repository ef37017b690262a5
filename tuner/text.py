"""What the CLIP text encoders of every family share: windows, cutting, new rows, pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    second: Tokens | None = None  # the same captions as a second text encoder reads them

    def each(self) -> tuple[Tokens, ...]:
        """For every text encoder what it reads."""
        return (self,) if self.second is None else (self, *self.second.each())

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with every tensor changed."""
        second = None if self.second is None else self.second.map(change)
        return Tokens(change(self.ids), change(self.ends), self.cut, second)

    def to(self, device: torch.device) -> Tokens:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class Text(NamedTuple):
    """Encoded captions."""

    hidden: Tensor  # [B, S, D], S = 77 W
    pooled: Tensor | None = None  # [B, P]

    def map(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The same with every tensor changed."""
        return Text(change(self.hidden), None if self.pooled is None else change(self.pooled))

    def to(self, device: torch.device) -> Text:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def tokenize(tokenizer: Any, captions: Sequence[str], windows: int = 1) -> Tokens:
    """Tokenise captions into windows of 75 tokens, each as the diffusers pipelines make theirs.

    Every window has its own start and end token and is padded with the pad token; a caption that needs fewer
    windows fills the rest with empty ones, so that all captions have one shape.

    Returns:
        Tokens; what lies behind the last window of a caption is cut and counted.
    """
    room = WINDOW - 2
    ids, ends, cut = [], [], []
    for caption in captions:
        inner = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        cut.append(max(0, len(inner) - windows * room))
        for start in range(0, windows * room, room):
            row = [tokenizer.bos_token_id, *inner[start : start + room], tokenizer.eos_token_id]
            ids.append(row + [tokenizer.pad_token_id] * (WINDOW - len(row)))
            ends.append(len(row) - 1)
    return Tokens(
        torch.tensor(ids, dtype=torch.int64).reshape(-1, windows, WINDOW),
        torch.tensor(ends, dtype=torch.int64).reshape(-1, windows),
        tuple(cut),
    )


class Reading(NamedTuple):
    """What a text encoder made of windows of tokens."""

    hidden: Tensor  # [B, 77 W, D], what a denoiser reads
    last: Tensor  # [B, 77, D], the last layer's, normalised, of the first window


def read(encoder: Any, ids: Tensor, skip: int, norm: bool) -> Reading:
    """Encode each window by itself and put the windows of a caption one behind the other.

    Args:
        encoder: a CLIP text encoder of transformers.
        ids: [B, W, 77].
        skip: which layer is read, 1 the last, 2 the one before it.
        norm: the layer goes through the encoder's final normalisation, as the last one always does inside.
    """
    last_alone = skip == 1 and norm
    output = encoder(ids.flatten(0, 1), output_hidden_states=not last_alone)
    last = output.last_hidden_state
    hidden = last
    if not last_alone:
        hidden = output.hidden_states[-skip]
        hidden = final_norm(encoder)(hidden) if norm else hidden
    count, windows = ids.shape[:2]
    joined = hidden.reshape(count, windows * ids.shape[2], -1)
    return Reading(joined, last.unflatten(0, (count, windows))[:, 0])


def final_norm(encoder: Any) -> nn.Module:
    """The normalisation behind a CLIP text encoder's last layer.

    transformers 5 has it in a CLIPTextModel itself and below `text_model` in one with a projection.
    """
    norm: nn.Module = getattr(encoder, "text_model", encoder).final_layer_norm
    return norm


def layers(encoder: Any) -> tuple[str, int]:
    """Where a CLIP text encoder's layers lie, and how many there are: `encoder.layers`, 12."""
    below = "text_model." if hasattr(encoder, "text_model") else ""
    return f"{below}encoder.layers", len(encoder.get_submodule(f"{below}encoder.layers"))


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
