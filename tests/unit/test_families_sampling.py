"""Pictures through diffusers' pipelines are those that the trainer's own predictions make, on every base."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner import verify
from tuner.errors import UserError
from tuner.export import files
from tuner.objective import Objective
from tuner.sample import Sampler
from tuner.task import Task

SIZE, STEPS, GUIDANCE = 64, 2, 3.0
PROMPTS, NEGATIVE = ["a red toy", "the sea"], "a"
BASES = ("sd1", "sd2", "sdxl", "sd1_inpaint", "sdxl_inpaint")
CPU = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)


def by_hand(sampler: Sampler, picture: Tensor | None) -> Tensor:
    """The latents that the sampler's pictures are decoded from, step by step with the trainer's calls."""
    from diffusers import DDIMScheduler

    task, family = sampler.task, sampler.task.family
    (method,) = task.each()
    scheduler = DDIMScheduler.from_config(dict(family.scheduler_config))
    scheduler.set_timesteps(STEPS)
    encoded = [task.encode(family.tokenize(words)) for words in (PROMPTS, [NEGATIVE] * 2)]
    latents = sampler._noise(0, 2)
    batch = SimpleNamespace(condition=picture)
    for t in scheduler.timesteps:
        times = t.expand(2)
        told = [family.condition(text) for text in encoded]
        with nullcontext() if picture is not None else method.off(family):
            right, wrong = (method.predict(family, latents, times, cond, batch) for cond in told)  # type: ignore[arg-type]
        latents = scheduler.step(wrong + GUIDANCE * (right - wrong), t, latents).prev_sample
    return latents


@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_a_pipelines_picture_is_the_one_that_predictions_make(
    name: str, controlled: bool, folders: dict[str, Path], models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    family = models.family_of(folders[name], "controlnet")
    method = models.method_of("controlnet", family)
    generator = torch.Generator().manual_seed(0)
    for place, parameter in method.trained().items():
        size = 0.3 if "controlnet_" in place else 0.03  # so that the condition is not lost on its way
        parameter += size * torch.randn(parameter.shape, generator=generator)
    task = Task(family, [method], Objective.from_scheduler_config(family.scheduler_config))
    sampler = Sampler(task, CPU, SIZE, STEPS, GUIDANCE, NEGATIVE, seed=4)  # type: ignore[arg-type]
    looks = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3)).astype(np.uint8)
    seen: list[Tensor] = []
    decode = family.decode_latents
    monkeypatch.setattr(family, "decode_latents", lambda latents: decode(seen.append(latents) or latents))
    made = sampler.pictures(PROMPTS, list(looks) if controlled else None, adapted=controlled)
    assert len(made) == 2 and made[0].shape == (SIZE, SIZE, 3) and not np.array_equal(made[0], made[1])
    picture = torch.from_numpy(looks.transpose(0, 3, 1, 2).astype(np.float32) / 255) if controlled else None
    expected = by_hand(sampler, picture)
    assert len(seen) == 1 and seen[0].shape == (2, 4, 8, 8)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    # What was compared is no mere noise: the prompt and the condition have their part in it.
    blank = torch.zeros(2, 3, SIZE, SIZE) if controlled else None
    other = by_hand(sampler, blank) if controlled else sampler._noise(0, 2)
    assert float((other - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd1_inpaint"])
def test_new_tokens_load_in_diffusers_on_every_family(
    name: str, folders: dict[str, Path], models: ModuleType, tmp_path: Path
) -> None:
    family = models.family_of(folders[name], "textual_inversion")
    method = models.move(models.method_of("textual_inversion", family))
    card = models.card_of(torch.float16, method)
    (path,) = method.export(family, tmp_path, card)
    tensors, _ = files.load(path)
    keys = ["clip_g", "clip_l"] if name == "sdxl" else ["<toy>"]
    assert path.name == "toy.safetensors" and sorted(tensors) == keys
    assert {key: list(t.shape) for key, t in tensors.items()} == {
        key: [3, 64 if key == "clip_g" else 32] for key in keys
    }
    (line,) = verify.check(family, [method], [path], card)
    assert ("with all 3 and 3 of its vectors" if name == "sdxl" else "with all 3 of its vectors") in line
    tensors[keys[0]] = tensors[keys[0]].flip(0) + 0.5
    files.save(path, tensors, {"format": "pt", "tuner.recipe": "{}"})
    with pytest.raises(UserError, match=f"{keys[0]} is not what was trained"):
        verify.check(family, [method], [path], card)


@pytest.mark.parametrize("options", [{"clip_skip": 2}, {"windows": 2}])
def test_previews_read_prompts_as_training_does(
    options: dict[str, int], folders: dict[str, Path], models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers' own clip_skip fails with the pinned transformers; here the pipelines get encoded prompts."""
    from tuner.families.sd1 import StableDiffusion1
    from tuner.family import Options

    family: Any = StableDiffusion1.load(
        folders["sd1"], ("unet", "vae", "text_encoder"), options=Options(**options)
    )
    plain = models.family_of(folders["sd1"], "full")
    pictures = []
    for one in (family, plain):
        task = Task(
            one, [models.method_of("full", one)], Objective.from_scheduler_config(one.scheduler_config)
        )
        seen: list[Tensor] = []
        one.denoiser.register_forward_pre_hook(
            lambda _, __, more, kept=seen: kept.append(more["encoder_hidden_states"]), with_kwargs=True
        )
        sampler = Sampler(task, CPU, SIZE, 1, GUIDANCE)  # type: ignore[arg-type]
        pictures.append(sampler.pictures(["a toy"])[0])
        text = one.encode_prompts(one.tokenize(["", "a toy"])).hidden
        assert len(seen) == 1 and torch.allclose(seen[0], text, atol=1e-6)
        assert seen[0].shape[1] == 77 * one.options.windows
    assert not np.array_equal(*pictures)
