"""Textual Inversion: the file teaches a bare tokeniser and text encoder the word as training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.data.captions import CaptionRule
from tuner.export import embedding
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
    token, family = method.config.token, scene.family
    path = one(files, embedding.file_name(token))
    tensors = load(path)
    trained = embedding.to_file(token, *method.rows.values())
    same_tensors(path.name, tensors, trained, card.dtype)
    rows = {encoder: tensors[key].float() for encoder, key in zip(method.rows, trained, strict=True)}
    pipe = scene.bare_pipeline(without_tokens=method.names)
    try:
        _load(pipe, path, token, rows)
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error
    _same_rows(path, pipe, method, rows)

    prompt = f"a photo of {token} on a red ground"
    spelled = CaptionRule(replace=method.replacements()).final(prompt)
    tokens = family.tokenize([spelled, PROMPTS[0]]).to(family.device)
    own = method.encode(family, tokens)
    stored = family.encode_prompts(tokens, {encoder: t.to(family.device) for encoder, t in rows.items()})
    other = family.around(pipe)
    converted = pipe.maybe_convert_prompt([prompt, PROMPTS[0]], next(iter(_tokenizers(pipe, rows).values())))
    loaded = other.encode_prompts(other.tokenize(converted).to(family.device))
    errors = []
    for has, rounded, wants in zip(loaded, stored, own, strict=True):
        if has is None or rounded is None or wants is None:
            continue  # a family without pooled output
        if not torch.equal(has[1], wants[1]):
            raise VerifyError(f"{path.name}: a prompt without {token} is encoded otherwise than by the base")
        if (off := distance(has[0], rounded[0])) > NOISE:
            raise VerifyError(
                f"{path.name}: a prompt with {token} is encoded otherwise, off by {off:.2g} of it"
            )
        errors.append(same_output(f"{path.name}: the encoded prompt", has[0], wants[0], card.dtype))
    vectors = " and ".join(str(len(one_of)) for one_of in rows.values())
    return {
        path: f"{path.name}: {token} loaded by diffusers with all {vectors} of its vectors; an "
        f"encoded prompt differs by {max(errors):.1e} of its size ({short(card.dtype)})"
    }


def _tokenizers(pipe: Any, rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """The pipeline's tokeniser of each text encoder."""
    return {encoder: getattr(pipe, encoder.replace("text_encoder", "tokenizer")) for encoder in rows}


def _load(pipe: Any, path: Path, token: str, rows: Mapping[str, Tensor]) -> None:
    """Load the file as its users do: as it is, or one of two tensors for each text encoder."""
    if len(rows) == 1:
        pipe.load_textual_inversion(str(path.parent), weight_name=path.name, local_files_only=True)
        return
    for encoder, tokenizer in _tokenizers(pipe, rows).items():
        own = {"text_encoder": getattr(pipe, encoder), "tokenizer": tokenizer}
        pipe.load_textual_inversion(rows[encoder], token=token, **own)


def _same_rows(path: Path, pipe: Any, method: TextualInversion, rows: Mapping[str, Tensor]) -> None:
    """The loaded encoders' new rows are the file's, under the words that training used."""
    for encoder, tokenizer in _tokenizers(pipe, rows).items():
        table = getattr(pipe, encoder).get_input_embeddings().weight
        ids = [int(number) for number in tokenizer.convert_tokens_to_ids(method.names)]
        first = len(tokenizer) - len(method.names)
        if ids != list(range(first, len(tokenizer))):
            raise VerifyError(
                f"{path.name}: diffusers loads other words from it than {', '.join(method.names)}"
            )
        if not torch.equal(table[ids].cpu(), rows[encoder].cpu()):
            raise VerifyError(f"{path.name}: the vectors in the loaded {encoder} are not the file's")
