"""Textual Inversion as one file that diffusers, ComfyUI, A1111, Forge and kohya read."""

from __future__ import annotations

import re

from torch import Tensor

from tuner.errors import UserError

_STEM = re.compile(r"\w[\w.+-]*")  # one word in a prompt, and a file name on every system


class TokenError(UserError):
    """A token that cannot name a file, or vectors that are no table."""


def to_file(token: str, vectors: Tensor) -> dict[str, Tensor]:
    """All vectors of one token, [n, dim], as the file's only tensor, named by the token.

    Never one key for each vector: ComfyUI would take the first and diffusers refuse the file.

    Raises:
        TokenError: the token is empty, or the vectors are not [n, dim] with n of at least 1.
    """
    if not token.strip():
        raise TokenError("the token is empty")
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise TokenError(f"{token}: vectors of shape {list(vectors.shape)}, expected [n, dim]")
    return {token: vectors.detach().contiguous()}


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
