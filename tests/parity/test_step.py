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
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tuner import base
from tuner.batch import Batch
from tuner.data.blob import File
from tuner.data.cache import Hashes
from tuner.data.captions import CaptionRule
from tuner.data.loader import Feed, Latents, Texts
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.views import Views
from tuner.method import Method
from tuner.methods import controlnet, full, lora, textual_inversion
from tuner.objective import Objective
from tuner.task import Task

SIZE = 64
BASES = ("sd1", "sd2", "sdxl", "sd1_inpaint", "sdxl_inpaint")
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


class Plain:
    """The parts of a Stable Diffusion training script."""

    def __init__(self, folder: Path) -> None:
        self.encoders: dict[str, Any] = {
            name: kind.from_pretrained(folder / name).requires_grad_(False).eval()
            for name, kind in ENCODERS.items()
            if (folder / name).is_dir()
        }
        self.tokenizers: dict[str, Any] = {
            name: CLIPTokenizer.from_pretrained(folder / name.replace("text_encoder", "tokenizer"))
            for name in self.encoders
        }
        self.vae: Any = AutoencoderKL.from_pretrained(folder / "vae").requires_grad_(False).eval()
        self.unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False).eval()
        self.scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")

    def text(self, batch: Batch, captions: tuple[str, ...]) -> dict[str, Any]:
        """What a UNet or a ControlNet is told of captions and sizes."""
        outputs = []
        for name, encoder in self.encoders.items():
            tokenizer = self.tokenizers[name]
            ids = tokenizer(
                list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            if name == "text_encoder_2":  # its config's old 2 would pool at a newly added token
                encoder.text_model.eos_token_id = tokenizer.eos_token_id
            outputs.append(encoder(ids, output_hidden_states=True))
        if len(outputs) == 1:
            assert batch.sizes is None
            return {"encoder_hidden_states": outputs[0].last_hidden_state}
        assert batch.sizes is not None
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        added = {"text_embeds": outputs[1].text_embeds, "time_ids": batch.sizes}
        return {"encoder_hidden_states": hidden, "added_cond_kwargs": added}

    def latents(self, pixels: Tensor, noise: Tensor | float) -> Tensor:
        with torch.no_grad():
            posterior = self.vae.encode(pixels).latent_dist
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    def noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, and what is to be predicted."""
        assert batch.pixels is not None
        latents = self.latents(batch.pixels, batch.posterior)
        t = (batch.u * self.scheduler.config.num_train_timesteps).long()
        predicts_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, batch.noise, t) if predicts_v else batch.noise
        return self.scheduler.add_noise(latents, batch.noise, t), t, target

    def shown(self, batch: Batch, noisy: Tensor) -> Tensor:
        """What goes into the UNet."""
        if self.unet.config.in_channels == 4:
            assert batch.hole is None
            return noisy
        assert batch.hole is not None and batch.pixels is not None
        around = self.latents(torch.where(batch.hole > 0, 0.0, batch.pixels), 0.0)
        hole = batch.hole[:, :, ::8, ::8]  # the nearest of each 8 x 8 pixels, as torch's interpolate takes it
        return torch.cat([noisy, hole, around], dim=1)

    def loss(self, batch: Batch, captions: tuple[str, ...], branch: Any = None) -> Tensor:
        noisy, t, target = self.noised(batch)
        text, more = self.text(batch, captions), {}
        if branch is not None:
            down, middle = branch(noisy, t, controlnet_cond=batch.condition, return_dict=False, **text)
            more = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return F.mse_loss(self.unet(self.shown(batch, noisy), t, **text, **more).sample, target)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    """Each tiny base."""
    return folders[request.param]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number, caption in enumerate(("a red ring", "", "a <new> by the sea <new>")):
        noise = np.random.default_rng(number).integers(0, 255, (8, 9, 3)).astype(np.uint8)
        place = folder / f"{number}.png"
        Image.fromarray(noise).resize((72, 64), Image.Resampling.NEAREST).save(place)
        made.append(Sample(File(place), (caption,)))
    return made


@pytest.fixture
def plain(folder: Path) -> Iterator[Plain]:
    yield Plain(folder)


class Ours:
    """The same by the framework: the batch, the loss and the gradients by name."""

    def __init__(self, folder: Path, hashes: Path, kind: Any, config: Any, samples: list[Sample]) -> None:
        family = base.load(str(folder), None, (), kind.NEEDS, 0, Hashes(hashes))
        self.method: Method = kind(config, family, 7)
        self.task = Task(family, [self.method], Objective.from_scheduler_config(family.scheduler_config))
        feed = Feed(
            Views(samples, SIZE, 3, "random", True, self.method.condition),
            CaptionRule(replace=self.method.replacements()),
            Latents(4, 8),
            Texts(family.tokenize),
            told=np.array([(64, 72)] * len(samples)) if family.told_sizes else None,
            holes=family.inpainting,
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
            mine[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("awake", [False, True])
def test_controlnet(folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample], awake: bool) -> None:
    ours = Ours(folder, tmp_path, controlnet.ControlNet, controlnet.Config(), samples)
    branch = ControlNetModel.from_unet(plain.unet)
    if branch.config.in_channels == 9:  # a branch of an inpainting base is called with the noisy latent alone
        whole, branch.conv_in = branch.conv_in, nn.Conv2d(4, 64, 3, padding=1)
        branch.conv_in.load_state_dict({"weight": whole.weight[:, :4], "bias": whole.bias})
    # The condition encoder's start is drawn: the same numbers for both.
    start = ours.method.control_branch()
    assert start is not None
    drawn = {n: p for n, p in start.state_dict().items() if n.startswith("controlnet_cond_embedding.")}
    assert len(drawn) == 16 and not branch.load_state_dict(drawn, strict=False).unexpected_keys
    if awake:  # nothing is zero any more
        generator = torch.Generator().manual_seed(0)
        theirs = dict(branch.named_parameters())
        with torch.no_grad():
            for name, one in start.named_parameters():
                noise = 0.02 * torch.randn(one.shape, generator=generator)
                one += noise
                theirs[name] += noise
    loss, found = ours.step()
    expected = plain.loss(ours.batch, ours.batch.captions, branch)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same(found, {f"branch.{n}": g for n, g in gradients(branch).items()}, least=60)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion(
    folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample], vectors: int
) -> None:
    config = textual_inversion.Config(token="<new>", init="red", vectors=vectors)
    ours = Ours(folder, tmp_path, textual_inversion.TextualInversion, config, samples)
    loss, found = ours.step()
    # The usual way: the whole tables are enlarged and trained, the new rows start as the initial word.
    names = ["<new>", *(f"<new>_{n}" for n in range(1, vectors))]
    tables: dict[str, nn.Embedding] = {}
    for name, encoder in plain.encoders.items():
        tokenizer, old = plain.tokenizers[name], encoder.get_input_embeddings()
        before = len(tokenizer)
        assert tokenizer.add_tokens(names) == vectors
        tables[name] = nn.Embedding(before + vectors, old.embedding_dim)
        (init,) = tokenizer("red", add_special_tokens=False).input_ids
        with torch.no_grad():
            tables[name].weight[:before] = old.weight
            tables[name].weight[before:] = old.weight[init]
        encoder.set_input_embeddings(tables[name])
    captions = tuple(s.captions[0].replace("<new>", " ".join(names)) for s in samples)
    assert captions == ours.batch.captions
    expected = plain.loss(ours.batch, captions)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    theirs = {}
    for name, table in tables.items():
        assert table.weight.grad is not None and table.weight.grad[:-vectors].any()
        theirs[f"rows.{name}"] = table.weight.grad[-vectors:]
    assert_same(found, theirs, least=len(plain.encoders))
    for name, rows in theirs.items():
        assert found[name].shape == rows.shape and bool(found[name].any(dim=1).all())


@pytest.mark.parametrize("text_encoder", [False, True])
def test_lora(folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample], text_encoder: bool) -> None:
    config = lora.Config(rank=4, alpha=2.0, text_encoder=text_encoder)
    ours = Ours(folder, tmp_path, lora.Lora, config, samples)
    hosts: dict[str, Any] = {"unet": plain.unet}
    plain.unet.add_adapter(
        LoraConfig(r=4, lora_alpha=2.0, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "tuner"
    )
    if text_encoder:
        hosts |= plain.encoders
        for encoder in plain.encoders.values():
            encoder.add_adapter(
                LoraConfig(r=4, lora_alpha=2.0, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"]),
                "tuner",
            )
    theirs = {f"{c}.{n}": p for c, m in hosts.items() for n, p in m.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    mine = ours.method.trained()
    # SDXL's first encoder is read before its last layer: an adapter in that one would never learn.
    dead = theirs.keys() - mine.keys()
    assert mine.keys() <= theirs.keys() and all(n.startswith("text_encoder.encoder.layers.2.") for n in dead)
    assert len(dead) == (8 if text_encoder and len(plain.encoders) == 2 else 0)
    with torch.no_grad():  # both at the same place, away from the zeros of the start
        for name, parameter in theirs.items():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name in mine:
                mine[name].copy_(parameter)
    loss, found = ours.step()
    expected = plain.loss(ours.batch, ours.batch.captions)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    expected_gradients = {f"{c}.{n}": g for c, m in hosts.items() for n, g in gradients(m).items()}
    assert_same(found, expected_gradients, least=16 * 5 + 8 * 2 * text_encoder)


def test_full(folder: Path, tmp_path: Path, plain: Plain, samples: list[Sample]) -> None:
    ours = Ours(folder, tmp_path, full.Full, full.Config(), samples)
    loss, found = ours.step()
    plain.unet.requires_grad_(True)
    expected = plain.loss(ours.batch, ours.batch.captions)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_same(found, {f"denoiser.{n}": g for n, g in gradients(plain.unet).items()}, least=150)
