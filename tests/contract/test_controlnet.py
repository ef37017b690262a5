"""ControlNet starts as the base exactly, and its parts wake in the order of arXiv 2302.05543, section 3.1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.family import Family

Bench = Any  # of conftest.py, which cannot be imported
Case = Any

OUTPUTS = ("branch.controlnet_down_blocks.", "branch.controlnet_mid_block.")
ENCODER = "branch.controlnet_cond_embedding."
LAST = ENCODER + "conv_out."


@pytest.fixture(params=["sd1", "sd2", "sdxl", "sd1_inpaint"])
def controlnet(request: pytest.FixtureRequest, cases: tuple[Case, ...], build: Callable[..., Bench]) -> Bench:
    plain = [
        case
        for case in cases
        if case.method == "controlnet" and case.config == {"condition": {"kind": "canny"}}
    ]
    (row,) = (case for case in plain if case.base == request.param)
    return build(row)


def test_at_the_start_base_and_controlnet_are_the_base_exactly(
    controlnet: Bench, load: Callable[[Case], Family]
) -> None:
    batch, t = controlnet.batch(), torch.tensor([0, 250, 500, 999])
    fresh = load(controlnet.case)
    assert batch.condition is not None and batch.condition.any()
    with torch.no_grad():
        cond = fresh.condition(fresh.encode_prompts(batch.tokens))
        expected = fresh.predict(fresh.denoiser, batch.noise, t, cond)
        found = controlnet.method.predict(controlnet.family, batch.noise, t, cond, batch)
        assert float((found - expected).abs().max()) == 0.0
        controlnet.wake()
        moved = controlnet.method.predict(controlnet.family, batch.noise, t, cond, batch)
    assert float((moved - expected).abs().max()) > 1e-3


def test_the_clone_is_the_base_and_the_zeros_are_zero(controlnet: Bench) -> None:
    """Every tensor of the branch that the UNet has too is its copy, not shared; the joints are all zero."""
    unet = dict(controlnet.family.denoiser.named_parameters())
    own = {name.removeprefix("branch."): p for name, p in controlnet.method.trained().items()}
    shared = own.keys() & unet.keys()
    assert len(shared) > 50
    told = {"add_embedding"} if controlnet.case.family == "sdxl" else set()
    assert {name.split(".")[0] for name in shared} == {
        "conv_in",
        "time_embedding",
        "down_blocks",
        "mid_block",
        *told,
    }
    # An inpainting base's branch sees the noisy latent alone, which comes first.
    unet["conv_in.weight"] = torch.nn.Parameter(unet["conv_in.weight"][:, :4])
    assert own["conv_in.weight"].shape[1] == controlnet.method.branch.config.in_channels == 4
    for name in shared:
        assert torch.equal(own[name], unet[name]) and own[name].data_ptr() != unet[name].data_ptr(), name
    zeros = [
        name for name in own if f"branch.{name}".startswith(OUTPUTS) or f"branch.{name}".startswith(LAST)
    ]
    assert len(zeros) == 2 * (len(controlnet.method.branch.controlnet_down_blocks) + 2)
    assert all(not own[name].any() for name in zeros)
    rest = own.keys() - shared - set(zeros)
    assert rest and all(name.startswith("controlnet_cond_embedding.") for name in rest)
    assert all(own[name].any() for name in rest if name.endswith("weight"))


def test_gradients_wake_in_order(controlnet: Bench) -> None:
    def awake() -> set[str]:
        gradients: dict[str, Tensor] = {n.removeprefix("0."): g for n, g in controlnet.gradients().items()}
        return {name for name, gradient in gradients.items() if gradient.any()}

    names = set(controlnet.method.trained())
    outputs = {name for name in names if name.startswith(OUTPUTS)}
    first_layers = {name for name in names if name.startswith(ENCODER) and not name.startswith(LAST)}
    assert len(outputs) >= 8 and len(first_layers) >= 6 and len(names) > len(outputs | first_layers) + 50
    batch, made = controlnet.batch(), controlnet.optimiser()
    controlnet.step(batch, made)
    assert awake() == outputs
    controlnet.step(batch, made)
    assert awake() == names - first_layers
    controlnet.step(batch, made)
    assert awake() == names
