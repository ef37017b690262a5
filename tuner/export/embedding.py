"""Textual Inversion as one file that diffusers, ComfyUI, A1111, Forge and kohya read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export import files

BUNDLED = "bundle_emb"
"""How the keys of vectors begin that lie in a LoRA's file."""

FOLDER = "bundle"
"""Where such a file lies: not beside the others, as diffusers refuses it."""

BOTH = ("clip_l", "clip_g")
"""The keys of a base with two text encoders, SDXL's first and second."""

SHOWN = 5  # keys that a message names

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
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


def from_file(path: Path, widths: Sequence[int]) -> list[Tensor]:
    """The vectors [n, dim] in a file, for each text encoder of a base those that are as wide as it.

    A base with one text encoder takes a file of one tensor, whatever its key (ours, kohya's `emb_params`, one
    that was saved by diffusers); [dim] is taken for one vector. With two text encoders the keys are BOTH.

    Args:
        widths: of the text encoders' vectors, in their order.

    Raises:
        TokenError: the file is missing, a pickle (A1111's .pt), damaged, or holds other tensors.
    """
    if path.suffix in _PICKLES:
        raise TokenError(
            f"{path}: a pickle, which can run any code when it is read; expected a .safetensors file "
            "(the web UIs and diffusers can save one)"
        )
    if path.is_dir():
        raise TokenError(f"{path}: is a folder; give the .safetensors in it")
    if not path.is_file():
        raise TokenError(f"{path}: no such file")
    try:
        tensors, _ = files.load(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise TokenError(f"{path}: not a whole .safetensors file: {error}") from error
    keys = list(tensors) if len(widths) == 1 else list(BOTH)
    if len(tensors) != len(widths) or set(keys) != tensors.keys():
        wanted = "one tensor" if len(widths) == 1 else " and ".join(BOTH)
        raise TokenError(f"{path}: holds {_shown(list(tensors))}; expected {wanted}, the vectors of a word")
    tables = []
    for key, width in zip(keys, widths, strict=True):
        table = tensors[key].float()
        table = table[None] if table.ndim == 1 else table
        if table.ndim != 2 or table.shape[1] != width or not bool(torch.isfinite(table).all()):
            raise TokenError(
                f"{path}: {key} is {list(tensors[key].shape)}; expected finite vectors [n, {width}]"
            )
        tables.append(table)
    if len({len(table) for table in tables}) != 1:
        raise TokenError(f"{path}: {' and '.join(BOTH)} have different numbers of vectors")
    return tables


def _shown(keys: Sequence[str]) -> str:
    """Keys in a message: the first five, and how many there are."""
    more = f" and {len(keys) - SHOWN} more ({len(keys)} tensors)" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}" if keys else "no tensor"


def bundle(adapter: Mapping[str, Tensor], words: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A LoRA's tensors and the vectors of words in one file, as A1111 reads it.

    A word's tensor becomes `bundle_emb.NAME.string_to_param.*`, of a base with two text encoders
    `bundle_emb.NAME.clip_l` and `.clip_g` (A1111: extensions-builtin/Lora/networks.py; ComfyUI:
    comfy/sd1_clip.py, bundled_embed, where the file lies among the embeddings). diffusers refuses a file with
    these keys; what each tool does with them is in tools.py (Rules.words).

    Args:
        adapter: in the names that those tools read.
        words: what `to_file` gave, by the name of the word's file without its ending.

    Raises:
        TokenError: a name with a dot, which these keys have no place for.
    """
    made = dict(adapter)
    check_bundle(words)
    for name, tensors in words.items():
        for key, table in tensors.items():
            inner = key if key in BOTH and len(tensors) == len(BOTH) else "string_to_param.*"
            made[f"{BUNDLED}.{name}.{inner}"] = table
    assert len(made) == len(adapter) + sum(map(len, words.values()))
    return made


def check_bundle(names: Iterable[str]) -> None:
    """Raises TokenError for a word's name that the keys of a bundle have no place for: one with a dot."""
    for name in names:
        if "." in name:
            raise TokenError(f"token {name}: a dot cannot stand in the name of a word that lies in a bundle")
