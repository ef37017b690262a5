"""One real training step of a full-size network, its weights random."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import base, optimiser
from tuner.batch import Batch
from tuner.families.sd1 import StableDiffusion1
from tuner.family import Moments
from tuner.methods.lora import Config, Lora
from tuner.objective import Objective
from tuner.task import Task
from tuner.text import Text

CONFIGS = Path(base.__file__).parent / "configs" / "sd15"


@pytest.mark.slow
def test_a_step_of_a_full_size_unet_in_bf16() -> None:
    from diffusers import DDPMScheduler, UNet2DConditionModel

    generator = torch.Generator().manual_seed(0)
    scheduler = dict(DDPMScheduler.from_pretrained(CONFIGS / "scheduler").config)
    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
    family = StableDiffusion1({"unet": unet}, {}, scheduler)
    method = Lora(Config(rank=4), family, 0)
    task = Task(family, [method], Objective.from_scheduler_config(scheduler))
    family.cast(torch.bfloat16, task.trained())
    # 128 layers of the sizes that the configuration gives; rank 4 is 797,184 numbers.
    assert len(task.trained()) == 256 and sum(p.numel() for p in task.trained()) == 797_184

    shape = (1, 4, 16, 16)
    latents, noise, posterior = (torch.randn(shape, generator=generator) for _ in range(3))
    batch = Batch(
        names=("a",),
        captions=("a",),
        weight=torch.ones(1),
        total=1.0,
        u=torch.tensor([0.5], dtype=torch.float64),
        noise=noise,
        posterior=posterior,
        moments=Moments(latents, torch.zeros(shape)),
        text=Text(torch.randn(1, 77, 768, generator=generator)),
    )
    frozen = {n: p for n, p in unet.named_parameters() if not p.requires_grad}
    sums = {n: p.double().sum() for n, p in frozen.items()}
    before = {n: p.detach().clone() for n, p in task.named_trained()}
    made = optimiser.build(method.groups(1e-3), "adamw", 1e-3, 0.01)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = task(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        made.step()
        made.zero_grad()
    assert all(math.isfinite(loss) for loss in losses) and losses[0] != losses[1]
    after = dict(task.named_trained())
    assert all(p.dtype == torch.float32 for p in after.values())
    moved = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert moved == after.keys()
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16} and len(frozen) == 686
    assert all(torch.equal(frozen[n].double().sum(), total) for n, total in sums.items())
