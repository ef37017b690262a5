"""The base that ships: a true small Stable Diffusion 1.x that plain diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tuner.base import EMBEDDED

COMPONENTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
}
MIB = 2**20


def test_one_fp16_file_a_component_and_small() -> None:
    sizes = {}
    for component, name in COMPONENTS.items():
        files = sorted(p.name for p in (EMBEDDED / component).iterdir())
        assert files == ["config.json", name], component
        sizes[component] = (EMBEDDED / component / name).stat().st_size
        with safe_open(EMBEDDED / component / name, framework="pt") as file:
            kinds = {str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
        assert kinds == {"F16"}, (component, kinds)
    assert len(sizes) == 4
    assert sizes["image_encoder"] <= 4 * MIB
    assert sum(sizes.values()) - sizes["image_encoder"] <= 32 * MIB


@pytest.fixture(scope="module")
def pipe() -> object:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(EMBEDDED)  # no dtype: as users call it


def test_plain_pipeline_makes_a_picture(pipe) -> None:
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.scheduler.config.beta_schedule == "scaled_linear"
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    assert made.images.shape == (1, 128, 128, 3)
    assert np.isfinite(made.images).all() and made.images.std() > 0


def test_controlnet_has_the_residuals_and_names_of_sd15(pipe) -> None:
    from diffusers import ControlNetModel

    names = set(ControlNetModel.from_unet(pipe.unet).state_dict())
    with torch.device("meta"):
        sd15 = ControlNetModel()  # the defaults are Stable Diffusion 1.5's
        large = ControlNetModel.from_config({**sd15.config, "cross_attention_dim": 768})
    # The shortcut convolutions depend on where channels change; all other names are the same.
    plain = {name for name in large.state_dict() if "conv_shortcut" not in name}
    assert plain == {name for name in names if "conv_shortcut" not in name}
    assert len({name.split(".")[1] for name in names if name.startswith("controlnet_down_blocks")}) == 12
    heads = pipe.unet.config.attention_head_dim
    widths = pipe.unet.config.block_out_channels
    assert [width // head for width, head in zip(widths, heads, strict=True)] == [64] * 4
    assert all(width % 64 == 0 for width in widths)


@pytest.mark.parametrize("prompt", ["a red circle", "Ünïcode 漢字 🙂", "<weird> \\ {}[]", "x" * 300, ""])
def test_any_prompt_is_read(pipe, prompt: str) -> None:
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    assert len(ids) == 77
    assert max(ids) < pipe.text_encoder.config.vocab_size
    inner = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    assert pipe.tokenizer.eos_token_id not in inner, (
        "the unknown token is the end token: no byte may be unknown"
    )


def test_every_byte_has_a_token_alone_and_at_a_words_end(pipe) -> None:
    vocabulary = json.loads(Path(EMBEDDED / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = ByteLevel.alphabet()
    assert len(symbols) == 256
    assert all(symbol in vocabulary and symbol + "</w>" in vocabulary for symbol in symbols)
    assert pipe.text_encoder.config.eos_token_id == vocabulary["<|endoftext|>"] != 2


def test_sizes_are_told(pipe) -> None:
    assert pipe.unet.config.sample_size == 16
    assert pipe.vae.config.latent_channels == 4
    assert pipe.text_encoder.config.max_position_embeddings == 77
    assert json.loads((EMBEDDED / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    assert pipe.vae.config.scaling_factor != 1.0
