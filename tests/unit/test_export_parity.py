"""Exports read back by diffusers have the effect that they had in training."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tuner.export import embedding, files, kohya

WIDTH = 32  # of the text encoder's hidden state
PROMPT = "a red star on blue"
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
UNET_LAYERS += [
    "conv1",
    "conv2",
    "conv_in",
    "conv_out",
    "conv_shortcut",
    "time_emb_proj",
    "linear_1",
    "linear_2",
]
UNET_LAYERS += ["downsamplers.0.conv", "upsamplers.0.conv"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte alphabet, each byte with and without the end-of-word mark, and no merges at all."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = {byte: 256 + index for index, byte in enumerate(sorted(set(range(256)) - set(kept)))}
    letters = [chr(moved.get(byte, byte)) for byte in range(256)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    assert len(set(words)) == 514
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def pipeline(folder: Path, layers: int = 1) -> StableDiffusionPipeline:
    """A tiny Stable Diffusion 1.x; equal weights at every call."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 64, 128, 128),
        layers_per_block=layers,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # in Stable Diffusion 1.x configurations: the number of heads
    )
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    text.bos_token_id, text.eos_token_id, text.pad_token_id = 512, 513, 513
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer(folder),
        unet=unet.eval(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def prediction(pipe: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """Text hidden state [1, 77, WIDTH] and the UNet's prediction [1, 4, 8, 8] from it."""
    ids = pipe.tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = pipe.text_encoder(ids)[0]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return hidden, pipe.unet(noise, torch.tensor([500]), hidden).sample


def adapt(model: torch.nn.Module, prefix: str, config: peft.LoraConfig) -> dict[str, kohya.LoraModule]:
    """Put a LoRA with random factors into `model`, in place; its modules by path."""
    peft.inject_adapter_in_model(config, model)
    state: dict[str, torch.Tensor] = {}
    scales: dict[str, float] = {}
    generator = torch.Generator().manual_seed(2)
    for path, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            up = layer.lora_B["default"].weight
            up.data = 0.1 * torch.randn(up.shape, generator=generator)
            state[f"{prefix}.{path}.lora_A.weight"] = layer.lora_A["default"].weight
            state[f"{prefix}.{path}.lora_B.weight"] = up
            scales[f"{prefix}.{path}"] = layer.scaling["default"]
    return kohya.from_peft(state, scales)


UNIFORM: dict[str, dict[str, object]] = {"unet": {}, "text": {}}
RSLORA: dict[str, dict[str, object]] = {"unet": {"use_rslora": True}, "text": {"use_rslora": True}}
MIXED: dict[str, dict[str, object]] = {
    "unet": {"rank_pattern": {"to_q": 2, "conv1": 6}, "alpha_pattern": {"to_q": 4, "to_v": 1, "conv2": 12}},
    "text": {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc1": 9, "q_proj": 2}},
}


@pytest.mark.parametrize("options", [UNIFORM, RSLORA, MIXED], ids=["uniform", "rslora", "mixed"])
@pytest.mark.parametrize("text", [False, True], ids=["unet", "unet and text"])
def test_a_lora_file_has_the_same_effect_in_diffusers(
    tmp_path: Path, options: dict[str, dict[str, object]], text: bool
) -> None:
    trained = pipeline(tmp_path, layers=2 if text else 1)
    plain = prediction(trained)
    common = {"r": 4, "lora_alpha": 8}
    modules = adapt(
        trained.unet, "unet", peft.LoraConfig(target_modules=UNET_LAYERS, **common, **options["unet"])
    )
    if text:
        config = peft.LoraConfig(target_modules=TEXT_LAYERS, **common, **options["text"])
        modules |= adapt(trained.text_encoder, "text_encoder", config)
    expected = prediction(trained)
    path = files.save(tmp_path / "x.safetensors", kohya.to_kohya(modules), {"format": "pt"})
    tensors, _ = files.load(path)
    assert len(tensors) == 3 * len(modules) and len(modules) > (200 if text else 100)

    fresh = pipeline(tmp_path, layers=2 if text else 1)
    fresh.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
    loaded = prediction(fresh)
    # Large enough that half or double the strength could not pass, as could one module left out.
    assert (expected[1] - plain[1]).abs().max() > 0.1
    assert (expected[0] - plain[0]).abs().max() > 0.01 if text else torch.equal(expected[0], plain[0])
    torch.testing.assert_close(loaded, expected, rtol=0, atol=1e-5)
    names = [f"{prefix}.{name}" for prefix in ("unet", "text_encoder") for name in lora_layers(fresh, prefix)]
    assert sorted(names) == sorted(modules)

    fresh.unload_lora_weights()
    assert all(torch.equal(left, right) for left, right in zip(prediction(fresh), plain, strict=True))


def lora_layers(pipe: StableDiffusionPipeline, component: str) -> list[str]:
    model = getattr(pipe, component)
    return [name for name, layer in model.named_modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_file_gives_its_rows_in_diffusers(tmp_path: Path, count: int) -> None:
    vectors = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(3))
    path = files.save(
        tmp_path / embedding.file_name("<toy>"), embedding.to_file("<toy>", vectors), {"format": "pt"}
    )
    assert path.name == "toy.safetensors"

    pipe = pipeline(tmp_path)
    before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    pipe.load_textual_inversion(path.parent, weight_name=path.name)
    tokens = ["<toy>", "<toy>_1", "<toy>_2"][:count]
    ids = pipe.tokenizer.convert_tokens_to_ids(tokens)
    assert ids == list(range(514, 514 + count))
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(table[ids], vectors)
    assert torch.equal(table[:514], before)
    prompt = pipe.maybe_convert_prompt("a <toy> here", pipe.tokenizer)
    encoded = pipe.tokenizer(prompt).input_ids
    assert [index for index in encoded if index >= 514] == ids
