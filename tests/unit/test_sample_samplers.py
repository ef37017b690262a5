"""Samplers by name are diffusers' schedulers on the base's own noise schedule."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch

from tuner import samplers
from tuner.errors import UserError
from tuner.objective import Objective

CLASSES = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-sde": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("name", CLASSES)
def test_each_is_made_from_the_bases_schedule(
    name: str, base: str, folders: dict[str, Path], models: ModuleType
) -> None:
    assert CLASSES.keys() == samplers.SAMPLERS.keys()
    family = models.family_of(folders[base])
    made = samplers.make(name, family.scheduler_config)
    wanted = getattr(diffusers, CLASSES[name])
    assert type(made) is wanted
    # As the users of diffusers exchange schedulers: from the config of the one in the folder.
    own = {"sdxl": diffusers.EulerDiscreteScheduler}.get(base, diffusers.DDIMScheduler)
    other = wanted.from_config(own.from_pretrained(folders[base] / "scheduler").config)
    assert torch.equal(made.alphas_cumprod, other.alphas_cumprod) and len(made.alphas_cumprod) == 1000
    for key in ("prediction_type", "timestep_spacing", "steps_offset", "beta_schedule"):
        assert made.config[key] == other.config[key], key
    assert made.config.prediction_type == ("v_prediction" if base == "sd2" else "epsilon")
    if name.startswith("dpm++"):
        assert made.config.algorithm_type == ("sde-" * name.endswith("-sde") + "dpmsolver++")


@pytest.mark.parametrize("name", CLASSES)
def test_schedules_that_end_in_noise_alone(name: str, folders: dict[str, Path], models: ModuleType) -> None:
    config = models.family_of(folders["sd2"]).scheduler_config
    config = Objective.from_scheduler_config(config, zero_terminal_snr=True).sampling(config)
    if name == "pndm":
        with pytest.raises(UserError, match="pndm.*noise alone.*one of ddim, dpm"):
            samplers.make(name, config)
        return
    made = samplers.make(name, config)
    made.set_timesteps(4)
    assert float(made.alphas_cumprod[-1]) < 1e-6 and int(made.timesteps[0]) == 999
    assert made.config.timestep_spacing == "trailing"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--sampler euler_a: unknown; did you mean euler-a\? Known: ddim, "):
        samplers.make("euler_a", {})
    with pytest.raises(UserError, match="--sampler zzz: unknown; expected one of ddim, pndm, "):
        samplers.make("zzz", {})
