"""Tiny random base models for tests: real structure, little weight.

And methods on them, moved from where they began. Reached through the fixtures of conftest.py (`sd1_folder`,
`models`): under --import-mode=importlib nothing in tests/ can be imported by name.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tuner.families.sd1 import StableDiffusion1
    from tuner.method import Card, Method

WIDTH = 32  # of the text encoder's hidden state
LETTERS = 514  # the tokeniser's words: every byte with and without an end-of-word mark, start and end


def tokenizer_files(folder: Path) -> Path:
    """A CLIP tokeniser of all bytes that merges nothing but `red` and `toy`, each one token."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = {byte: 256 + index for index, byte in enumerate(sorted(set(range(256)) - set(kept)))}
    letters = [chr(moved.get(byte, byte)) for byte in range(256)]
    merged = ["re", "red</w>", "to", "toy</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    assert len(set(words)) == LETTERS + len(merged)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\nt o\nto y</w>\n")
    return folder


def tiny_sd1(folder: Path, seed: int = 0, layers: int = 1) -> Path:
    """Write a tiny random Stable Diffusion 1.x in diffusers layout; equal weights for equal arguments.

    UNet: two levels of 64 channels with cross-attention (heads 32 wide); autoencoder: factor 8, 4 channels;
    CLIP text encoder: width 32, 2 layers; DDIM schedule with epsilon prediction. An image encoder (32 pixels,
    projection 32) lies beside for contrastive training. Its tokens `red` and `toy` are single ones.

    Args:
        layers: the UNet's layers_per_block.
    """
    from diffusers import DDIMScheduler
    from transformers import CLIPTokenizer

    words = tokenizer_files(folder / "words")
    tokenizer = CLIPTokenizer(
        str(words / "vocab.json"),
        str(words / "merges.txt"),
        model_max_length=77,
        pad_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, network in networks(len(tokenizer), layers).items():
            network.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    for file in words.iterdir():
        file.unlink()
    words.rmdir()
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    return folder


def networks(words: int, layers: int = 1) -> dict[str, Any]:
    """The networks by component name, drawn from torch's global generator."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    return {
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=layers,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,  # in Stable Diffusion 1.x configurations: the number of heads
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=64,
            scaling_factor=0.5,
            mid_block_add_attention=False,
        ),
        "text_encoder": CLIPTextModel(text),
        "image_encoder": CLIPVisionModelWithProjection(vision),
    }


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

CONFIGS: dict[str, dict[str, Any]] = {  # of every method, on the tiny base
    "controlnet": {},
    "textual_inversion": {"token": "<toy>", "init": "toy", "vectors": 3},
    "lora": {"rank": 4, "alpha": 8.0, "targets": "attention+feed-forward", "text_encoder": True},
    "full": {},
    "autoencoder": {},
    "contrastive": {},
}


def family_of(folder: Path, *names: str) -> StableDiffusion1:
    """The tiny base with what the named methods need."""
    from tuner.families.sd1 import StableDiffusion1

    kinds = [importlib.import_module(f"tuner.methods.{name}").METHOD for name in names]
    return StableDiffusion1.load(folder, sorted({need for kind in kinds for need in kind.NEEDS}))


def method_of(name: str, family: StableDiffusion1, **config: Any) -> Method:
    """A method on the tiny base, as a run builds it."""
    module = importlib.import_module(f"tuner.methods.{name}")
    made: Method = module.METHOD(module.Config(**(CONFIGS[name] | config)), family, seed=3)
    return made


def move(method: Method, by: float = 0.1, seed: int = 5) -> Method:
    """Every trained tensor gets noise of a part of its own size, or of `by` where it is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.trained().values():
            size = float(parameter.abs().mean()) or 1.0
            parameter.add_(by * size * torch.randn(parameter.shape, generator=generator))
    return method


def card_of(dtype: torch.dtype, *methods: Method) -> Card:
    """What the exports of these methods say about themselves."""
    from tuner.method import Card

    return Card("case", dtype, {method.kind: {"format": "pt", "tuner.recipe": "{}"} for method in methods})
