"""The choices of ControlNet guidance against their formulas, and what they make of real ControlNets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner import guidance

# Stable Diffusion 1.x at 512 pixels: conv_in, two layers and a downsampling of each level, the middle block.
SD1 = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 3 + [8]
SDXL = [128] * 3 + [64] * 3 + [32] * 3 + [32]  # at 1024 pixels
WEIGHTED = ("64/h", "0.825^k", "logspace")


def test_the_papers_weights_are_64_by_the_height() -> None:
    assert len(SD1) == 13
    assert guidance.by_height(SD1) == [64 / height for height in SD1]
    assert guidance.by_height(SD1) == [1.0] * 3 + [2.0] * 3 + [4.0] * 3 + [8.0] * 4
    assert guidance.by_height([height // 4 for height in SD1]) == guidance.by_height(SD1)  # at 128 pixels
    assert guidance.by_height(SDXL) == [1.0] * 3 + [2.0] * 3 + [4.0] * 4


def test_the_published_codes_weights_are_powers_of_0_825() -> None:
    assert guidance.by_power(SD1) == [0.825 ** (12 - i) for i in range(13)]
    assert guidance.by_power(SDXL) == [0.825 ** (9 - i) for i in range(10)]
    assert guidance.by_power(SD1)[-1] == 1.0 and guidance.by_power(SD1)[0] == pytest.approx(0.0994, abs=1e-4)


@pytest.mark.parametrize("heights", [SD1, SDXL])
def test_diffusers_weights_are_logarithmically_spaced(heights: list[int]) -> None:
    made = torch.tensor(guidance.by_logspace(heights))
    torch.testing.assert_close(made, torch.logspace(-1, 0, len(heights)), rtol=1e-6, atol=0)
    assert guidance.by_logspace(heights)[-1] == 1.0


def test_every_choice_has_its_formula_and_its_weights() -> None:
    assert tuple(guidance.FORMULAS) == ("both", "conditional", *WEIGHTED)
    seen = {name: tuple(guidance.weights(name, SD1)) for name in guidance.FORMULAS}
    assert seen["both"] == seen["conditional"] == (1.0,) * 13
    assert len(set(seen.values())) == 4
    for name in WEIGHTED:
        assert list(seen[name]) == sorted(seen[name]), "deeper blocks count more"


@pytest.mark.parametrize("name", guidance.FORMULAS)
def test_residuals_are_multiplied(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [16, 16, 8, 8]
    down = [torch.randn(2, 3, size, 2 * size, generator=generator) for size in sizes]
    middle = torch.randn(2, 3, 8, 16, generator=generator)
    kept = [tensor.clone() for tensor in (*down, middle)]
    rest, last = guidance.weighted(name, down, middle)
    factors = guidance.weights(name, [*sizes, 8])
    assert len(rest) == 4 and len(factors) == 5
    for found, old, factor in zip([*rest, last], kept, factors, strict=True):
        assert torch.equal(found, old * factor)
    assert all(torch.equal(a, b) for a, b in zip([*down, middle], kept, strict=True)), "inputs are left"


@pytest.fixture(scope="module")
def nets(sd1_folder: Path, models: ModuleType) -> list[Any]:
    """Two ControlNets of a tiny base, nothing in them zero."""
    family = models.family_of(sd1_folder, "controlnet")
    made = []
    for seed in (1, 2):
        branch = family.control_branch(3).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in branch.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        made.append(branch)
    return made


@pytest.fixture(scope="module")
def residuals(nets: list[Any]) -> Callable[..., list[Tensor]]:
    """What the nets, together or each alone, give for fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    x_t, text = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.randn(2, 77, 32, generator=generator),
    )
    looks = [torch.rand(2, 3, 64, 64, generator=generator) for _ in nets]

    @torch.no_grad()
    def of(which: list[int], scales: list[float], choice: str | None, guess_mode: bool) -> list[Tensor]:
        from diffusers.models import MultiControlNetModel

        control = MultiControlNetModel([nets[i] for i in which])
        if choice is not None:
            guidance.steer(control, choice)
        down, middle = control(
            x_t,
            torch.tensor(401),
            encoder_hidden_states=text,
            controlnet_cond=[looks[i] for i in which],
            conditioning_scale=scales,
            guess_mode=guess_mode,
            return_dict=False,
        )
        return [*down, middle]

    return of


@pytest.mark.parametrize("choice", ["both", "conditional"])
def test_two_control_nets_add_up(residuals: Callable[..., list[Tensor]], choice: str) -> None:
    together = residuals([0, 1], [1.0, 0.5], choice, choice != "both")
    one, other = residuals([0], [1.0], None, False), residuals([1], [0.5], None, False)
    assert len(together) == len(one) == len(other) == 5
    for found, a, b in zip(together, one, other, strict=True):
        assert torch.equal(found, a + b) and bool((a != 0).any()) and bool((b != 0).any())


@pytest.mark.parametrize("choice", WEIGHTED)
def test_weights_come_in_place_of_diffusers_own(residuals: Callable[..., list[Tensor]], choice: str) -> None:
    plain = residuals([0, 1], [1.0, 0.5], None, False)
    found = residuals([0, 1], [1.0, 0.5], choice, True)
    factors = guidance.weights(choice, [tensor.shape[-2] for tensor in plain])
    assert len(found) == len(factors) == 5 and len(set(factors)) > 1
    for has, was, factor in zip(found, plain, factors, strict=True):
        assert torch.equal(has, was * factor if factor != 1.0 else was)


def test_logspace_is_what_diffusers_guess_mode_does(residuals: Callable[..., list[Tensor]]) -> None:
    own, diffusers = (residuals([0], [1.0], choice, True) for choice in ("logspace", None))
    assert len(own) == len(diffusers) == 5
    for has, wants in zip(own, diffusers, strict=True):
        torch.testing.assert_close(has, wants, rtol=1e-6, atol=0)
