"""Textual Inversion: the file teaches a bare tokeniser and text encoder the word as training did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tuner.data.captions import CaptionRule
from tuner.export.embedding import file_name
from tuner.method import Card, Method
from tuner.methods.textual_inversion import TextualInversion
from tuner.verify.compare import (
    LOADING,
    NOISE,
    VerifyError,
    distance,
    load,
    one,
    same_output,
    same_tensors,
    short,
)
from tuner.verify.scene import PROMPTS, Scene


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove `TOKEN.safetensors` through `load_textual_inversion`.

    Raises:
        VerifyError: the file's key, shape or vectors are not what was trained, the loaded word is another
            one, or a prompt with or without it is encoded otherwise.
    """
    assert isinstance(method, TextualInversion)
    token, trained = method.config.token, method.rows.detach()
    path = one(files, file_name(token))
    tensors = load(path)
    same_tensors(path.name, tensors, {token: trained}, card.dtype)
    pipe = scene.bare_pipeline(without_tokens=method.names)
    try:
        pipe.load_textual_inversion(str(path.parent), weight_name=path.name, local_files_only=True)
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error
    _same_rows(path, pipe, method, tensors[token].float())

    prompt = f"a photo of {token} on a red ground"
    spelled = CaptionRule(replace=method.replacements()).final(prompt)
    tokens = scene.family.tokenize([spelled, PROMPTS[0]]).to(scene.family.device)
    own = method.encode(scene.family, tokens).hidden
    stored = scene.family.encode_prompts(tokens, tensors[token].to(trained)).hidden
    loaded = pipe.encode_prompt([prompt, PROMPTS[0]], scene.family.device, 1, False)[0]
    if not torch.equal(loaded[1], own[1]):
        raise VerifyError(f"{path.name}: a prompt without {token} is encoded otherwise than by the base")
    if (off := distance(loaded[0], stored[0])) > NOISE:
        raise VerifyError(f"{path.name}: a prompt with {token} is encoded otherwise, off by {off:.2g} of it")
    difference = same_output(f"{path.name}: the encoded prompt", loaded[0], own[0], card.dtype)
    return {
        path: f"{path.name}: {token} loaded by diffusers with all {len(trained)} of its vectors; an "
        f"encoded prompt differs by {difference:.1e} of its size ({short(card.dtype)})"
    }


def _same_rows(path: Path, pipe: Any, method: TextualInversion, rows: torch.Tensor) -> None:
    """The loaded encoder's new rows are the file's, under the words that training used."""
    table = getattr(pipe, method.encoder).get_input_embeddings().weight
    tokenizer = getattr(pipe, method.encoder.replace("text_encoder", "tokenizer"))
    ids = [int(number) for number in tokenizer.convert_tokens_to_ids(method.names)]
    first = len(tokenizer) - len(method.names)
    if ids != list(range(first, len(tokenizer))):
        raise VerifyError(f"{path.name}: diffusers loads other words from it than {', '.join(method.names)}")
    if not torch.equal(table[ids].cpu(), rows.cpu()):
        raise VerifyError(f"{path.name}: the vectors in the loaded text encoder are not the file's")
