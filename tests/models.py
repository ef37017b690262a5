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
    from tuner.method import Card, Method
    from tuner.stable_diffusion import StableDiffusion

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


def tiny_sd1(folder: Path, seed: int = 0, layers: int = 1, in_channels: int = 4) -> Path:
    """Write a tiny random Stable Diffusion 1.x in diffusers layout; equal weights for equal arguments.

    UNet: two levels of 64 channels with cross-attention (heads 32 wide); autoencoder: factor 8, 4 channels;
    CLIP text encoder: width 32, 2 layers; DDIM schedule with epsilon prediction. An image encoder (32 pixels,
    projection 32) lies beside for contrastive training. Its tokens `red` and `toy` are single ones.

    Args:
        layers: the UNet's layers_per_block.
        in_channels: 9 for an inpainting base.
    """
    tokenizer = tokenizer_of(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, network in networks(len(tokenizer), layers, in_channels).items():
            network.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    return folder


def tiny_sd2(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random Stable Diffusion 2.x: linear projections, 64-wide heads, v-prediction.

    Its text encoder is read at its last layer, for the folder leaves one out; it pads with `!`.
    """
    tokenizer = tokenizer_of(folder, pad="!")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = networks(len(tokenizer))
        made["unet"] = unet(WIDTH, attention_head_dim=(1, 1), use_linear_projection=True)
        made["text_encoder"] = text_encoder(len(tokenizer), hidden_act="gelu", num_hidden_layers=3)
        for name, network in made.items():
            network.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2))
    return folder


def tiny_sdxl(folder: Path, seed: int = 0, in_channels: int = 4) -> Path:
    """Write a tiny random Stable Diffusion XL: a level without attention and one of two transformer layers.

    Text encoders of 32 and 64 with 3 layers; the second's config has the old `eos_token_id` 2, as SDXL's.
    """
    from transformers import CLIPTextModelWithProjection

    tokenizers = {"tokenizer": tokenizer_of(folder), "tokenizer_2": tokenizer_of(folder, pad="!")}
    words = len(tokenizers["tokenizer"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = networks(words)
        made["unet"] = unet(
            3 * WIDTH,
            in_channels=in_channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 1),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 48,
        )
        made["text_encoder"] = text_encoder(words, num_hidden_layers=3)
        made["text_encoder_2"] = text_encoder(
            words,
            kind=CLIPTextModelWithProjection,
            hidden_size=2 * WIDTH,
            num_hidden_layers=3,
            hidden_act="gelu",
            projection_dim=48,
            eos_token_id=2,
        )
        for name, network in made.items():
            network.save_pretrained(folder / name)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    scheduler("EulerDiscreteScheduler", timestep_spacing="leading").save_pretrained(folder / "scheduler")
    second = {
        "_class_name": "StableDiffusionXLPipeline",
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    (folder / "model_index.json").write_text(json.dumps(INDEX | second, indent=2))
    return folder


def tokenizer_of(folder: Path, pad: str = "<|endoftext|>") -> Any:
    """The tiny tokeniser, made within a folder that is left as it was."""
    from transformers import CLIPTokenizer

    words = tokenizer_files(folder / "words")
    tokenizer = CLIPTokenizer(
        str(words / "vocab.json"),
        str(words / "merges.txt"),
        model_max_length=77,
        pad_token=pad,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    for file in words.iterdir():
        file.unlink()
    words.rmdir()
    return tokenizer


def scheduler(kind: str = "DDIMScheduler", **more: Any) -> Any:
    """Stable Diffusion's schedule."""
    import diffusers

    ddim = {"clip_sample": False, "set_alpha_to_one": False} if kind == "DDIMScheduler" else {}
    common = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return getattr(diffusers, kind)(**common, **ddim, **more)


def unet(cross_attention_dim: int, **more: Any) -> Any:
    """A UNet of two levels of 64 channels."""
    from diffusers import UNet2DConditionModel

    shape = {
        "sample_size": 8,
        "block_out_channels": (64, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
    }
    return UNet2DConditionModel(**shape | {"cross_attention_dim": cross_attention_dim} | more)


def text_encoder(words: int, kind: Any = None, **more: Any) -> Any:
    """A CLIP text encoder; `kind` is CLIPTextModel unless given."""
    from transformers import CLIPTextConfig, CLIPTextModel

    shape = {
        "vocab_size": words,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": WIDTH,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": words - 1,
    }
    return (kind or CLIPTextModel)(CLIPTextConfig(**shape | more))


def networks(words: int, layers: int = 1, in_channels: int = 4) -> dict[str, Any]:
    """Stable Diffusion 1.x's networks by component name, drawn from torch's global generator."""
    from diffusers import AutoencoderKL
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

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
        # attention_head_dim is in Stable Diffusion's configurations the number of heads.
        "unet": unet(WIDTH, layers_per_block=layers, attention_head_dim=2, in_channels=in_channels),
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
        "text_encoder": text_encoder(words),
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


def family_of(folder: Path, *names: str) -> StableDiffusion:
    """The base in a folder with what the named methods need."""
    from tuner.base import recognise

    kinds = [importlib.import_module(f"tuner.methods.{name}").METHOD for name in names]
    family: Any = importlib.import_module(f"tuner.families.{recognise(folder)}").FAMILY
    made: StableDiffusion = family.load(folder, sorted({need for kind in kinds for need in kind.NEEDS}))
    return made


def method_of(name: str, family: StableDiffusion, **config: Any) -> Method:
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
