"""One training step against the same step written with plain diffusers, transformers and peft calls.

Of the framework only the batch's numbers are used: pixels, captions, condition, noise, the timestep's draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from tuner import base
from tuner.batch import Batch
from tuner.data.cache import Hashes
from tuner.data.captions import CaptionRule
from tuner.data.loader import Feed, Latents, Texts
from tuner.data.plan import Slot
from tuner.data.sources import Sample
from tuner.method import Method
from tuner.methods import controlnet, full, lora, textual_inversion
from tuner.objective import Objective
from tuner.task import Task

SIZE = 64


class Plain:
    """The parts of a Stable Diffusion training script."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        self.text_encoder = (
            CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False).eval()
        )
        self.vae = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False).eval()
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False).eval()
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")

    def hidden(self, captions: tuple[str, ...]) -> Tensor:
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids)[0]

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Noisy latents and timesteps."""
        with torch.no_grad():
            posterior = self.vae.encode(batch.pixels).latent_dist
        latents = (posterior.mean + posterior.std * batch.posterior) * self.vae.config.scaling_factor
        t = (batch.u * self.scheduler.config.num_train_timesteps).long()
        return self.scheduler.add_noise(latents, batch.noise, t), t


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number, caption in enumerate(("a red ring", "", "a <new> by the sea <new>")):
        noise = np.random.default_rng(number).integers(0, 255, (8, 9, 3)).astype(np.uint8)
        place = folder / f"{number}.png"
        Image.fromarray(noise).resize((72, 64), Image.Resampling.NEAREST).save(place)
        made.append(Sample(place, (caption,)))
    return made


@pytest.fixture
def plain(sd1_folder: Path) -> Iterator[Plain]:
    yield Plain(sd1_folder)


class Ours:
    """The same by the framework: the batch, the loss and the gradients by name."""

    def __init__(self, folder: Path, hashes: Path, kind: Any, config: Any, samples: list[Sample]) -> None:
        family = base.load(str(folder), None, (), kind.NEEDS, 0, Hashes(hashes))
        self.method: Method = kind(config, family, 7)
        self.task = Task(family, [self.method], Objective.from_scheduler_config(family.scheduler_config))
        feed = Feed(
            samples,
            SIZE,
            3,
            CaptionRule(replace=self.method.replacements()),
            Latents(4, 8),
            Texts(family.tokenize),
            self.method.condition,
            flip=True,
            crop="random",
        )
        self.batch = feed.batch([Slot(i, 2, 5 + i, 1.0) for i in range(len(samples))], float(len(samples)))

    def step(self) -> tuple[Tensor, dict[str, Tensor]]:
        self.method.train_mode(True)
        loss, _ = self.task(self.batch)
        loss.backward()
        return loss.detach(), {
            name: p.grad for name, p in self.method.trained().items() if p.grad is not None
        }


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor], least: int) -> None:
    """Equal within float32 rounding; of tensors that cancel to nothing, relative to the largest of all."""
    assert mine.keys() == theirs.keys() and len(mine) >= least
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert largest > 0
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            mine[name], gradient, rtol=1e-5, atol=1e-6 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("awake", [False, True])
def test_controlnet(
    sd1_folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample], awake: bool
) -> None:
    ours = Ours(sd1_folder, tmp_path, controlnet.ControlNet, controlnet.Config(), samples)
    branch = ControlNetModel.from_unet(plain.unet)
    # The condition encoder's start is drawn: the same numbers for both.
    start = ours.method.control_branch()
    assert start is not None
    drawn = {n: p for n, p in start.state_dict().items() if n.startswith("controlnet_cond_embedding.")}
    assert len(drawn) == 16 and not branch.load_state_dict(drawn, strict=False).unexpected_keys
    if awake:  # nothing is zero any more
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for one, other in zip(start.parameters(), branch.parameters(), strict=True):
                noise = 0.02 * torch.randn(one.shape, generator=generator)
                one += noise
                other += noise
    loss, found = ours.step()
    noisy, t = plain.noised(ours.batch)
    hidden = plain.hidden(ours.batch.captions)
    down, middle = branch(
        noisy, t, encoder_hidden_states=hidden, controlnet_cond=ours.batch.condition, return_dict=False
    )
    pred = plain.unet(
        noisy, t, hidden, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    expected = F.mse_loss(pred, ours.batch.noise)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same(found, {f"branch.{n}": g for n, g in gradients(branch).items()}, least=60)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion(
    sd1_folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample], vectors: int
) -> None:
    config = textual_inversion.Config(token="<new>", init="red", vectors=vectors)
    ours = Ours(sd1_folder, tmp_path, textual_inversion.TextualInversion, config, samples)
    loss, found = ours.step()
    # The usual way: the whole table is enlarged and trained, the new rows start as the initial word.
    names = ["<new>", *(f"<new>_{n}" for n in range(1, vectors))]
    before = len(plain.tokenizer)
    assert plain.tokenizer.add_tokens(names) == vectors
    old = plain.text_encoder.get_input_embeddings()
    enlarged = nn.Embedding(before + vectors, old.embedding_dim)
    (init,) = plain.tokenizer("red", add_special_tokens=False).input_ids
    with torch.no_grad():
        enlarged.weight[:before] = old.weight
        enlarged.weight[before:] = old.weight[init]
    plain.text_encoder.set_input_embeddings(enlarged)
    captions = tuple(s.captions[0].replace("<new>", " ".join(names)) for s in samples)
    assert captions == ours.batch.captions
    noisy, t = plain.noised(ours.batch)
    pred = plain.unet(noisy, t, plain.hidden(captions)).sample
    expected = F.mse_loss(pred, ours.batch.noise)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert enlarged.weight.grad is not None and enlarged.weight.grad[:before].any()
    assert_same(found, {"rows": enlarged.weight.grad[before:]}, least=1)
    assert found["rows"].shape == (vectors, old.embedding_dim) and bool(found["rows"].any(dim=1).all())


@pytest.mark.parametrize("text_encoder", [False, True])
def test_lora(
    sd1_folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample], text_encoder: bool
) -> None:
    config = lora.Config(rank=4, alpha=2.0, text_encoder=text_encoder)
    ours = Ours(sd1_folder, tmp_path, lora.Lora, config, samples)
    hosts: dict[str, Any] = {"unet": plain.unet}
    plain.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=2.0, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "tuner"
    )
    if text_encoder:
        hosts["text_encoder"] = plain.text_encoder
        plain.text_encoder.add_adapter(
            LoraConfig(r=4, lora_alpha=2.0, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]),
            "tuner",
        )
    theirs = {f"{c}.{n}": p for c, m in hosts.items() for n, p in m.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    mine = ours.method.trained()
    assert mine.keys() == theirs.keys()
    with torch.no_grad():  # both at the same place, away from the zeros of the start
        for name, parameter in theirs.items():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            mine[name].copy_(parameter)
    loss, found = ours.step()
    noisy, t = plain.noised(ours.batch)
    pred = plain.unet(noisy, t, plain.hidden(ours.batch.captions)).sample
    expected = F.mse_loss(pred, ours.batch.noise)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    expected_gradients = {f"{c}.{n}": g for c, m in hosts.items() for n, g in gradients(m).items()}
    assert_same(found, expected_gradients, least=16 * 5 + 8 * 2 * text_encoder)


def test_full(sd1_folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample]) -> None:
    ours = Ours(sd1_folder, tmp_path, full.Full, full.Config(), samples)
    loss, found = ours.step()
    plain.unet.requires_grad_(True)
    noisy, t = plain.noised(ours.batch)
    pred = plain.unet(noisy, t, plain.hidden(ours.batch.captions)).sample
    expected = F.mse_loss(pred, ours.batch.noise)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same(found, {f"denoiser.{n}": g for n, g in gradients(plain.unet).items()}, least=150)
