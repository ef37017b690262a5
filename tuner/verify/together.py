"""New words and a LoRA of one run: their files loaded into one pipeline, and the one file that holds both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tuner.data.captions import CaptionRule
from tuner.export import embedding
from tuner.export import files as export_files
from tuner.method import Card
from tuner.methods.lora import Lora
from tuner.methods.textual_inversion import TextualInversion
from tuner.text import Text
from tuner.verify.compare import LOADING, VerifyError, load, one, same_effect, same_tensors, short
from tuner.verify.public import HASH, check_metadata
from tuner.verify.scene import PROMPTS, Scene
from tuner.verify.textual_inversion import converted, load_word

ADAPTER = "export"


def check(
    scene: Scene, lora: Lora, words: TextualInversion, files: Sequence[Path], card: Card
) -> dict[Path, str]:
    """Prove `bundle/NAME.safetensors`, and that the LoRA's and the words' files work together.

    Raises:
        VerifyError: the bundle does not hold the other files' tensors, or a prompt with all words is drawn
            otherwise by a pipeline that loaded the files than by the trainer.
    """
    path = one(files, f"{embedding.FOLDER}/{card.name}.safetensors")
    single = [file for file in files if file != path]
    alone = [file for file in single if file.name == path.name][-1]
    own = {token: one(single, embedding.file_name(token)) for token in words.places()}
    tensors = load(path)
    wanted = embedding.bundle(load(alone), {file.stem: load(file) for file in own.values()})
    count = same_tensors(f"bundle/{path.name}", tensors, wanted, card.dtype)
    check_metadata(path, {k: v for k, v in export_files.load(alone)[1].items() if k != HASH})
    line = f"bundle/{path.name}: all {count} tensors are those of {len(own) + 1} files"
    if len(own) > 1:
        line += "; ComfyUI reads its words as one"
    loads = [form.place for form in lora.forms(card.name) if "diffusers" in form.tools]
    if not loads:
        return {path: f"{line}; diffusers loads no {lora.how.kind}"}
    error = _effect(scene, lora, words, own, one(single, loads[0]), card)
    return {
        path: f"{line}; these loaded together by diffusers change a prediction as training did "
        f"({error:.1e} of the effect, {short(card.dtype)})"
    }


def _effect(
    scene: Scene, lora: Lora, words: TextualInversion, own: dict[str, Path], adapter: Path, card: Card
) -> float:
    """How far the loaded files' effect on a prediction is off the trainer's, relative to it."""
    prompts = [f"a photo of {' and '.join(own)}", PROMPTS[0]]
    rule = CaptionRule(replace=tuple((w.token, " ".join(w.names())) for w in words.words))
    family, spelled = scene.family, [rule.final(prompt) for prompt in prompts]

    def trainer() -> tuple[Text, Tensor]:
        tokens = family.tokenize(spelled).to(family.device)
        text = family.encode_prompts(tokens, words.new_rows())
        return text, scene.with_denoiser(family.denoiser, text)

    text, prediction = trainer()
    with scene.without([lora, words]):
        text_before, before = trainer()
    pipe = scene.bare_pipeline(without_tokens=words.names)
    _load(pipe, words, own, adapter)
    other = family.around(pipe)
    loaded = other.encode_prompts(other.tokenize(converted(pipe, prompts)).to(family.device))
    what = "the files loaded together: the "
    same_effect(f"{what}encoded prompt", loaded.hidden, text.hidden, text_before.hidden, card.dtype)
    found = scene.with_denoiser(pipe.unet, loaded)
    return same_effect(f"{what}prediction", found, prediction, before, card.dtype)


def _load(pipe: Any, words: TextualInversion, own: dict[str, Path], adapter: Path) -> None:
    """The LoRA, then each word, as users load them."""
    try:
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name, adapter_name=ADAPTER)
    except LOADING as error:
        raise VerifyError(f"{adapter.name} does not load in diffusers: {error}") from error
    for token, path in own.items():
        tensors = load(path)
        keys = list(embedding.BOTH) if len(words.encoders) > 1 else list(tensors)
        rows = {encoder: tensors[key].float() for encoder, key in zip(words.encoders, keys, strict=True)}
        load_word(pipe, path, token, rows)
