"""Textual Inversion: each file teaches a bare tokeniser and text encoder its word as training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.data.captions import CaptionRule
from tuner.export import embedding
from tuner.method import Card, Method
from tuner.methods.textual_inversion import TextualInversion, Word
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
    """Prove every `TOKEN.safetensors` through `load_textual_inversion`.

    All of them are loaded into one pipeline, one behind the other.

    Raises:
        VerifyError: a file's key, shape or vectors are not what was trained, the loaded word is another one,
            or a prompt with or without it is encoded otherwise.
    """
    assert isinstance(method, TextualInversion)
    pipe = scene.bare_pipeline(without_tokens=method.names)
    proved = {}
    for word, place in zip(method.words, method.places().values(), strict=True):
        path = one(files, embedding.file_name(word.token))
        trained = [method.table(encoder)[place] for encoder in method.encoders]
        tensors, named = load(path), embedding.to_file(word.token, *trained)
        same_tensors(path.name, tensors, named, card.dtype)
        rows = {name: tensors[key].float() for name, key in zip(method.encoders, named, strict=True)}
        load_word(pipe, path, word.token, rows)
        _same_rows(path, pipe, word, rows)
        proved[path] = _same_prompt(scene, method, word, pipe, path, rows, card.dtype)
    return proved


def load_word(pipe: Any, path: Path, token: str, rows: Mapping[str, Tensor]) -> None:
    """Load a file as its users do: as it is, or one of two tensors for each text encoder.

    Raises:
        VerifyError: diffusers does not take it.
    """
    try:
        if len(rows) == 1:
            pipe.load_textual_inversion(str(path.parent), weight_name=path.name, local_files_only=True)
            return
        for encoder, tokenizer in _tokenizers(pipe, rows).items():
            own = {"text_encoder": getattr(pipe, encoder), "tokenizer": tokenizer}
            pipe.load_textual_inversion(rows[encoder], token=token, **own)
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error


def converted(pipe: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with all rows of a loaded word in place of it, as diffusers' pipelines write them."""
    made = pipe.maybe_convert_prompt(list(prompts), pipe.tokenizer)
    return [str(prompt) for prompt in made]


def _same_prompt(
    scene: Scene,
    method: TextualInversion,
    word: Word,
    pipe: Any,
    path: Path,
    rows: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> str:
    """A prompt with the word, and one without, read as the trainer reads them; the line that says so."""
    family, prompt = scene.family, f"a photo of {word.token} on a red ground"
    spelled = CaptionRule(replace=((word.token, " ".join(word.names())),)).final(prompt)
    tokens = family.tokenize([spelled, PROMPTS[0]]).to(family.device)
    own = method.encode(family, tokens)
    place = method.places()[word.token]
    tables = {encoder: table.clone() for encoder, table in method.new_rows().items()}
    for encoder, table in tables.items():
        table[place] = rows[encoder].to(table.device)
    stored = family.encode_prompts(tokens, tables)
    other = family.around(pipe)
    loaded = other.encode_prompts(other.tokenize(converted(pipe, [prompt, PROMPTS[0]])).to(family.device))
    errors = []
    for has, rounded, wants in zip(loaded, stored, own, strict=True):
        if has is None or rounded is None or wants is None:
            continue  # a family without pooled output
        if not torch.equal(has[1], wants[1]):
            raise VerifyError(
                f"{path.name}: a prompt without {word.token} is encoded otherwise than by the base"
            )
        if (off := distance(has[0], rounded[0])) > NOISE:
            raise VerifyError(
                f"{path.name}: a prompt with {word.token} is encoded otherwise, off by {off:.2g} of it"
            )
        errors.append(same_output(f"{path.name}: the encoded prompt", has[0], wants[0], dtype))
    vectors = " and ".join(str(len(one_of)) for one_of in rows.values())
    return (
        f"{path.name}: {word.token} loaded by diffusers with all {vectors} of its vectors; an "
        f"encoded prompt differs by {max(errors):.1e} of its size ({short(dtype)})"
    )


def _tokenizers(pipe: Any, rows: Mapping[str, Tensor]) -> dict[str, Any]:
    """The pipeline's tokeniser of each text encoder."""
    return {encoder: getattr(pipe, encoder.replace("text_encoder", "tokenizer")) for encoder in rows}


def _same_rows(path: Path, pipe: Any, word: Word, rows: Mapping[str, Tensor]) -> None:
    """The loaded encoders' newest rows are the file's, under the words that training used."""
    names = word.names()
    for encoder, tokenizer in _tokenizers(pipe, rows).items():
        table = getattr(pipe, encoder).get_input_embeddings().weight
        ids = [int(number) for number in tokenizer.convert_tokens_to_ids(names)]
        first = len(tokenizer) - len(names)
        if ids != list(range(first, len(tokenizer))):
            raise VerifyError(f"{path.name}: diffusers loads other words from it than {', '.join(names)}")
        if not torch.equal(table[ids].cpu(), rows[encoder].cpu()):
            raise VerifyError(f"{path.name}: the vectors in the loaded {encoder} are not the file's")
