"""Tiny random captioning and matching models for tests: real structure, little weight, a tokeniser of words.

Reached through the fixture `captioners` of conftest.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tuner import cli
from tuner.data.samples import Samples
from tuner.data.sources.opening import open_spec
from tuner.data.sources.spec import SourceSpec

SIDE = 16  # pixels that each model looks at
WORDS = [
    "a",
    "an",
    "the",
    "two",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "photo",
    "of",
    "on",
    "and",
    "with",
]
WORDS += [
    "picture",
    "shape",
    "white",
    "black",
    "small",
    "large",
    "left",
    "right",
    "describe",
    "in",
    "one",
    ".",
]
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP = 0, 2, 3
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": SIDE, "patch_size": 8}


def tokenizer(folder: Path, more: tuple[str, ...] = ()) -> Any:
    """A BERT tokeniser that knows a few words; saved into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: index for index, word in enumerate([*MARKS, *WORDS, *more])}
    made = transformers.BertTokenizer(vocab=vocabulary, model_max_length=32)
    made.save_pretrained(folder)
    return made


def images(folder: Path, kind: str = "BlipImageProcessor") -> None:
    """The configuration of an image processor."""
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "do_center_crop": False,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def _save(network: Any, folder: Path, seed: int) -> Path:
    """Writes a network with weights so large that captions of different pictures differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        if parameter.ndim > 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * (3 if "embed" in name else 1) / parameter.shape[-1] ** 0.5
    network.save_pretrained(folder)
    return folder


def _text(words: int) -> dict[str, Any]:
    return {
        "vocab_size": words,
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 24,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": CLS,
        "eos_token_id": SEP,
        "sep_token_id": SEP,
        "pad_token_id": PAD,
    }


def _blip(folder: Path) -> transformers.BlipConfig:
    words = len(tokenizer(folder))
    images(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "BlipProcessor"}))
    return transformers.BlipConfig(
        text_config=_text(words), vision_config=VISION, projection_dim=16, image_text_hidden_size=16
    )


def blip(folder: Path, seed: int = 0) -> Path:
    """A BLIP that writes captions."""
    return _save(transformers.BlipForConditionalGeneration(_blip(folder)), folder, seed)


def blip_itm(folder: Path, seed: int = 0) -> Path:
    """A BLIP that matches captions."""
    return _save(transformers.BlipForImageTextRetrieval(_blip(folder)), folder, seed)


def _blip2(folder: Path, matching: bool) -> transformers.Blip2Config:
    words = len(tokenizer(folder, () if matching else ("<image>",)))
    images(folder)
    processor = {"processor_class": "Blip2Processor", "num_query_tokens": 4}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    language = transformers.OPTConfig(
        vocab_size=words,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        bos_token_id=CLS,
        eos_token_id=SEP,
        pad_token_id=PAD,
        tie_word_embeddings=False,  # or each word is likeliest behind itself
    )
    asking = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 16,
        "vocab_size": words,
        "max_position_embeddings": 32,
        "use_qformer_text_input": matching,
    }
    return transformers.Blip2Config(
        vision_config=VISION,
        qformer_config=asking,
        text_config=language.to_dict(),
        num_query_tokens=4,
        image_text_hidden_size=16,
        image_token_index=None if matching else words - 1,
    )


def blip2(folder: Path, seed: int = 0) -> Path:
    """A BLIP-2 with an OPT that writes captions."""
    return _save(transformers.Blip2ForConditionalGeneration(_blip2(folder, False)), folder, seed)


def blip2_itm(folder: Path, seed: int = 0) -> Path:
    """A BLIP-2 that matches captions."""
    return _save(transformers.Blip2ForImageTextRetrieval(_blip2(folder, True)), folder, seed)


def git(folder: Path, seed: int = 0) -> Path:
    """A GIT: one decoder that reads the picture and goes on with words."""
    words = len(tokenizer(folder))
    images(folder, "CLIPImageProcessor")
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "GitProcessor"}))
    config = transformers.GitConfig(vision_config=VISION, **_text(words))
    return _save(transformers.GitForCausalLM(config), folder, seed)


def encoder_decoder(folder: Path, seed: int = 0) -> Path:
    """A ViT with a BERT that writes."""
    words = len(tokenizer(folder))
    images(folder, "ViTImageProcessor")
    small = {
        key: value for key, value in _text(words).items() if key not in ("projection_dim", "sep_token_id")
    }
    del small["encoder_hidden_size"]
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**VISION), transformers.BertConfig(**small)
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = CLS, PAD, SEP
    made = transformers.VisionEncoderDecoderModel(config)
    made.generation_config.decoder_start_token_id = CLS
    made.generation_config.pad_token_id, made.generation_config.eos_token_id = PAD, SEP
    return _save(made, folder, seed)


def clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP pair."""
    words = len(tokenizer(folder))
    images(folder, "CLIPImageProcessor")
    text = _text(words)
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return _save(transformers.CLIPModel(config), folder, seed)


def llava(folder: Path, seed: int = 0) -> Path:
    """A LLaVA: a language model that chats about a picture."""
    made = tokenizer(folder)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.save_pretrained(folder)
    images(folder, "CLIPImageProcessor")
    (folder / "chat_template.jinja").write_text(
        "{% for said in messages %}{% for part in said.content %}"
        "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}"
        "{% endfor %}{% endfor %}in one"
    )
    processor = {"processor_class": "LlavaProcessor", "patch_size": 8, "image_token": "<image>"}
    processor |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    language = transformers.LlamaConfig(
        vocab_size=len(made),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=CLS,
        eos_token_id=SEP,
        pad_token_id=PAD,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=language,
        image_token_index=made.convert_tokens_to_ids("<image>"),
    )
    return _save(transformers.LlavaForConditionalGeneration(config), folder, seed)


# Folders, and the command


def picture(path: str | Path, seed: int) -> None:
    """Save small noise as a picture."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (3, 4, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((40, 30), Image.Resampling.NEAREST).save(path)


def beside(count: int = 6) -> Path:
    """A folder of pictures, every other one with a .txt."""
    for index in range(count):
        picture(f"mine/{'deep/' * (index % 2)}{index}.png", index)
        if index % 2 == 0:
            Path(f"mine/{index}.txt").write_text(f"a red circle {index}\n")
    return Path("mine")


def run(*words: str | Path) -> int:
    """`tuner caption` with these words; its exit code."""
    return cli.main(["caption", *map(str, words)])


def lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def opened(path: str | Path, **more: Any) -> Samples:
    """A folder as a recipe's source."""
    samples = open_spec(SourceSpec(path=str(path), **more), lambda text: None)
    assert isinstance(samples, Samples)
    return samples
