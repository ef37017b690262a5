"""Samplers by name: diffusers' schedulers, made from the base's own noise schedule."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from tuner.errors import UserError


class Kind(NamedTuple):
    """A sampler.

    Attributes:
        scheduler: the name of diffusers' class.
        settings: what it is given beside the base's schedule.
        title: how the web UIs call it.
    """

    scheduler: str
    settings: Mapping[str, Any]
    title: str


SAMPLERS: Mapping[str, Kind] = {
    "ddim": Kind("DDIMScheduler", {}, "DDIM"),  # arXiv 2010.02502
    # arXiv 2202.09778; its first steps as Stable Diffusion's, without Runge-Kutta ones.
    "pndm": Kind("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    # arXiv 2211.01095
    "dpm++": Kind("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}, "DPM++ 2M"),
    "dpm++-sde": Kind("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE"),
    "euler": Kind("EulerDiscreteScheduler", {}, "Euler"),  # arXiv 2206.00364, algorithm 2
    "euler-a": Kind("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    "unipc": Kind("UniPCMultistepScheduler", {}, "UniPC"),  # arXiv 2302.04867
}


def known(name: str, names: Mapping[str, Any], option: str) -> str:
    """The name, if it is one of `names`.

    Raises:
        UserError: it is not; with the nearest one.
    """
    if name not in names:
        near = difflib.get_close_matches(name.lower(), names, n=1)
        hint = f"did you mean {near[0]}? Known: " if near else "expected one of "
        raise UserError(f"{option} {name}: unknown; {hint}{', '.join(names)}")
    return name


def make(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a sampler.

    Args:
        name: one of SAMPLERS.
        config: the base's noise schedule as a diffusers scheduler's config: betas, prediction type, spacing,
            offset. What it does not say is as the class has it.

    Raises:
        UserError: there is no such sampler, or it does not know a schedule that ends in noise alone.
    """
    import diffusers

    kind = SAMPLERS[known(name, SAMPLERS, "--sampler")]
    if config.get("rescale_betas_zero_snr") and not _ends_in_noise(kind):
        able = ", ".join(other for other, one in SAMPLERS.items() if _ends_in_noise(one))
        raise UserError(
            f"--sampler {name}: this base's noise schedule ends in noise alone (zero terminal SNR), which "
            f"this sampler does not know; take one of {able}"
        )
    return getattr(diffusers, kind.scheduler).from_config(dict(config), **kind.settings)


def _ends_in_noise(kind: Kind) -> bool:
    """Whether the scheduler knows zero terminal SNR (arXiv 2305.08891)."""
    import diffusers

    made = inspect.signature(getattr(diffusers, kind.scheduler).__init__)
    return "rescale_betas_zero_snr" in made.parameters
