"""Textual Inversion as one file that diffusers, ComfyUI, A1111, Forge and kohya read."""

from __future__ import annotations

import re

from torch import Tensor

from tuner.errors import UserError

BOTH = ("clip_l", "clip_g")
"""The keys of a base with two text encoders, SDXL's first and second."""

_STEM = re.compile(r"\w[\w.+-]*")  # one word in a prompt, and a file name on every system


class TokenError(UserError):
    """A token that cannot name a file, or vectors that are no table."""


def to_file(token: str, vectors: Tensor, second: Tensor | None = None) -> dict[str, Tensor]:
    """All vectors of one token, [n, dim], as the file's only tensor, named by the token.

    Never one key for each vector: ComfyUI would take the first and diffusers refuse the file. With the
    vectors of a second text encoder, [n, other dim], there is a tensor for each, named as in BOTH.

    Raises:
        TokenError: the token is empty, or the vectors are not [n, dim] with one n of at least 1.
    """
    if not token.strip():
        raise TokenError("the token is empty")
    tables = [vectors] if second is None else [vectors, second]
    for table in tables:
        if table.ndim != 2 or 0 in table.shape or len(table) != len(vectors):
            raise TokenError(f"{token}: vectors of shape {list(table.shape)}, expected [n, dim]")
    names = [token] if second is None else BOTH
    return {name: table.detach().contiguous() for name, table in zip(names, tables, strict=True)}


def file_name(token: str) -> str:
    """`<toy>` -> `toy.safetensors`: ComfyUI and A1111 call the embedding by its file's name.

    Raises:
        TokenError: what stands between the brackets is not one plain word (letters, digits, `_ . + -`):
            it could leave the folder, or could not be written in a prompt.
    """
    stem = token.removeprefix("<").removesuffix(">")
    if not _STEM.fullmatch(stem) or stem.endswith(".") or len(stem.encode()) > 200:
        raise TokenError(
            f"token {token!r} cannot name a file: expected one word of letters, digits, '_', '.', '+' or "
            "'-', with or without <> around it"
        )
    return f"{stem}.safetensors"
