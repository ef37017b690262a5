"""What `tuner sample` draws is what the plain diffusers pipelines draw, in every mode, on every base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tuner.errors import UserError
from tuner.generate import draw
from tuner.generate.draw import Drawer, How
from tuner.generate.shown import Shown
from tuner.samplers import SAMPLERS, make

BASES = ("sd1", "sd2", "sdxl", "sd1_inpaint", "sdxl_inpaint")
SIZE = (64, 96)  # width and height
STEPS, GUIDANCE, STRENGTH = 3, 3.0, 0.7
PROMPTS, NEGATIVE, SEEDS = ["a red toy", "the sea"], "a", [4, 9]
DRAWN = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8)
HOLE = np.zeros((SIZE[1], SIZE[0]), np.uint8)
HOLE[20:70, 8:40] = 255
LOOKS = [np.random.default_rng(n).integers(0, 256, (SIZE[1], SIZE[0], 3)).astype(np.uint8) for n in (1, 2)]
Pictures = list[np.ndarray]
Nets = Callable[[str], list[Any]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def unit(picture: np.ndarray) -> Tensor:
    """[1, k, H, W] in [0, 1] of uint8."""
    values = picture.reshape(*picture.shape[:2], -1).transpose(2, 0, 1)
    return torch.from_numpy(values.astype(np.float32) / 255)[None]


def shown(mode: str, conditions: int = 0) -> Shown:
    return Shown(
        SIZE,
        None if mode == "text" else unit(DRAWN),
        unit(HOLE) if mode == "mask" else None,
        tuple(unit(look) for look in LOOKS[:conditions]),
    )


def drawn(drawer: Drawer, prompts: list[str], seeds: list[int], negative: str = NEGATIVE) -> Pictures:
    family = drawer.family
    with torch.no_grad():
        *texts, wrong = (family.encode_prompts(family.tokenize([text])) for text in (*prompts, negative))
    return drawer.draw(texts, wrong, seeds, lambda: None)


@pytest.fixture(scope="module")
def nets(folders: dict[str, Path], models: ModuleType) -> Nets:
    """Two ControlNets of a base, nothing in them zero."""
    made: dict[str, list[Any]] = {}

    def of(base: str) -> list[Any]:
        if base not in made:
            family = models.family_of(folders[base], "controlnet")
            made[base] = [family.control_branch(3).eval() for _ in range(2)]
            for seed, branch in enumerate(made[base]):
                generator = torch.Generator().manual_seed(seed)
                with torch.no_grad():
                    for name, parameter in branch.named_parameters():
                        size = 0.2 if "controlnet_" in name else 0.02
                        parameter += size * torch.randn(parameter.shape, generator=generator)
        return made[base]

    return of


Plain = Callable[..., Pictures]


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Plain:
    """The same through a pipeline of diffusers, called as its documentation does."""
    loaded: dict[str, Any] = {}

    def pictures(base: str, mode: str, sampler: str, branches: Sequence[Any] = (), **more: Any) -> Pictures:
        part = {"text": "", "image": "Img2Img", "mask": "Inpaint"}[mode]
        if "inpaint" in base:
            part = "Inpaint"
        family = "StableDiffusionXL" if "sdxl" in base else "StableDiffusion"
        if base not in loaded:
            loaded[base] = getattr(diffusers, f"{family}Pipeline").from_pretrained(folders[base])
        kind = getattr(diffusers, f"{family}{'ControlNet' * bool(branches)}{part}Pipeline")
        pipe = kind.from_pipe(loaded[base], **({"controlnet": list(branches)} if branches else {}))
        pipe.scheduler = make(sampler, pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if "inpaint" in base:  # shown the mean and not a draw, as in training
            pipe._encode_vae_image = lambda image, generator: (
                pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor
            )
        made = pipe(
            PROMPTS,
            negative_prompt=[NEGATIVE] * 2,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="np",
            **arguments(mode, part, len(branches)),
            **more,
        ).images
        return list((made * 255).round().astype(np.uint8))

    return pictures


def arguments(mode: str, part: str, conditions: int) -> dict[str, Any]:
    """Sizes and pictures as the pipelines' documentation gives them."""
    call: dict[str, Any] = {"height": SIZE[1], "width": SIZE[0]} if part != "Img2Img" or conditions else {}
    if part:
        grey = torch.full((2, 3, SIZE[1], SIZE[0]), 0.5)
        call["image"] = grey if mode == "text" else [Image.fromarray(DRAWN)] * 2
        call["strength"] = 1.0 if mode == "text" else STRENGTH
    if part == "Inpaint":
        call["mask_image"] = [Image.fromarray(HOLE if mode == "mask" else np.full_like(HOLE, 255))] * 2
    if conditions:
        looks = [Image.fromarray(look) for look in LOOKS[:conditions]]
        call["control_image" if part else "image"] = looks
    return call


def difference(found: Pictures, wanted: Pictures) -> int:
    """The largest one of a value, 0 to 255; asserts that values differ rarely and no picture is mere grey.

    1 is the rounding of the last step to 256 values. The tiny autoencoder makes much of the rounding in an
    all-grey picture, which inpainting bases are shown.
    """
    assert len(found) == len(wanted) == 2
    for has, wants in zip(found, wanted, strict=True):
        assert has.shape == wants.shape == (SIZE[1], SIZE[0], 3)
        assert (has != wants).mean() < 0.1 and has.std() > 5
    assert np.abs(found[0].astype(int) - found[1]).max() > 10
    return max(int(np.abs(has.astype(int) - wants).max()) for has, wants in zip(found, wanted, strict=True))


@pytest.mark.parametrize("mode", ["text", "image", "mask"])
@pytest.mark.parametrize("base", BASES)
def test_parity(base: str, mode: str, folders: dict[str, Path], models: ModuleType, plain: Plain) -> None:
    family = models.family_of(folders[base], "lora")
    how = How("ddim", STEPS, GUIDANCE, 1.0 if mode == "text" else STRENGTH)
    drawer = Drawer(family, [], shown(mode), how)
    assert difference(drawn(drawer, PROMPTS, SEEDS), plain(base, mode, "ddim")) <= 1


@pytest.mark.parametrize(
    "base, mode",
    [("sd1", "text"), ("sd1", "image"), ("sd1", "mask"), ("sd2", "text"), ("sdxl", "text")]
    + [("sdxl", "image"), ("sdxl", "mask"), ("sd1_inpaint", "mask"), ("sdxl_inpaint", "mask")],
)
def test_parity_with_two_control_nets(
    base: str, mode: str, folders: dict[str, Path], models: ModuleType, nets: Nets, plain: Plain
) -> None:
    family, scales = models.family_of(folders[base], "lora"), (1.0, 0.5)
    how = How("ddim", STEPS, GUIDANCE, 1.0 if mode == "text" else STRENGTH, "both", scales)
    drawer = Drawer(family, nets(base), shown(mode, 2), how)
    wanted = plain(base, mode, "ddim", nets(base), controlnet_conditioning_scale=list(scales))
    assert difference(drawn(drawer, PROMPTS, SEEDS), wanted) <= 1
    alone = Drawer(
        family, nets(base)[:1], shown(mode, 1), How("ddim", STEPS, GUIDANCE, how.strength, "both", (1.0,))
    )
    assert np.abs(drawn(alone, PROMPTS, SEEDS)[0].astype(int) - wanted[0]).max() > 10


@pytest.mark.parametrize("mode", ["text", "image", "mask"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parity_of_every_sampler(
    sampler: str, mode: str, folders: dict[str, Path], models: ModuleType, plain: Plain
) -> None:
    base = {"text": "sd2", "image": "sd1", "mask": "sd1"}[mode]
    family = models.family_of(folders[base], "lora")
    how = How(sampler, STEPS, GUIDANCE, 1.0 if mode == "text" else STRENGTH)
    drawer = Drawer(family, [], shown(mode), how)
    ticks: list[int] = []
    with torch.no_grad():
        *texts, wrong = (family.encode_prompts(family.tokenize([p])) for p in (*PROMPTS, NEGATIVE))
    found = drawer.draw(texts, wrong, SEEDS, lambda: ticks.append(1))
    assert difference(found, plain(base, mode, sampler)) <= 1
    assert len(ticks) == drawer.predictions(), "progress ends where it says"


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_logspace_is_the_guess_mode_of_diffusers(
    base: str, folders: dict[str, Path], models: ModuleType, nets: Nets, plain: Plain
) -> None:
    family = models.family_of(folders[base], "lora")
    how = How("ddim", STEPS, GUIDANCE, 1.0, "logspace", (1.0,))
    made = drawn(Drawer(family, nets(base)[:1], shown("text", 1), how), PROMPTS, SEEDS)
    wanted = plain(base, "text", "ddim", nets(base)[:1], controlnet_conditioning_scale=[1.0], guess_mode=True)
    assert difference(made, wanted) <= 1


def test_control_in_both_branches_leaves_guidance_nothing_to_do_without_a_prompt(
    folders: dict[str, Path], models: ModuleType, nets: Nets
) -> None:
    family, net = models.family_of(folders["sd1"], "lora"), nets("sd1")[:1]
    made = {}
    for choice, scale in (("both", 5.0), ("both", 1.0), ("conditional", 5.0), ("64/h", 5.0)):
        how = How("ddim", STEPS, scale, 1.0, choice, (1.0,))
        made[choice, scale] = drawn(Drawer(family, net, shown("text", 1), how), [""], [0], negative="")[
            0
        ].astype(int)
    assert np.abs(made["both", 5.0] - made["both", 1.0]).max() <= 1
    assert np.abs(made["conditional", 5.0] - made["both", 1.0]).max() > 10
    assert np.abs(made["64/h", 5.0] - made["conditional", 5.0]).max() > 10


@pytest.mark.parametrize("sampler", ["ddim", "euler-a", "dpm++-sde"])
@pytest.mark.parametrize("mode", ["text", "image", "mask"])
def test_a_picture_depends_on_its_own_prompt_and_seed_alone(
    mode: str, sampler: str, folders: dict[str, Path], models: ModuleType
) -> None:
    family = models.family_of(folders["sd1"], "lora")
    how = How(sampler, STEPS, GUIDANCE, 1.0 if mode == "text" else STRENGTH)
    drawer = Drawer(family, [], shown(mode), how)
    alone = [drawn(drawer, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    again = [drawn(drawer, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(alone, again, strict=True))
    assert difference(drawn(drawer, PROMPTS, SEEDS), alone) <= 1


def test_all_of_draws_in_parts_in_order(folders: dict[str, Path], models: ModuleType) -> None:
    family = models.family_of(folders["sd1"], "lora")
    drawer = Drawer(family, [], shown("text"), How("ddim", 1, 1.0))
    with torch.no_grad():
        one, other, wrong = (family.encode_prompts(family.tokenize([p])) for p in (*PROMPTS, ""))
    single = draw.all_of(drawer, [one, one, other], wrong, [4, 5, 4], 1)
    pairs = draw.all_of(drawer, [one, one, other], wrong, [4, 5, 4], 2)
    assert len(single) == len(pairs) == 3
    assert np.array_equal(single[0], drawn(drawer, PROMPTS[:1], [4], "")[0])
    for a, b in zip(single, pairs, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    assert not np.array_equal(single[0], single[1]) and not np.array_equal(single[0], single[2])


def test_without_guidance_the_negative_prompt_is_not_read(
    folders: dict[str, Path], models: ModuleType
) -> None:
    family = models.family_of(folders["sdxl"], "lora")
    drawer = Drawer(family, [], shown("text"), How("ddim", 1, 1.0))
    one, other = (drawn(drawer, PROMPTS, SEEDS, negative) for negative in ("a", "b"))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_lower_precision_is_the_networks_alone(
    base: str, folders: dict[str, Path], models: ModuleType, nets: Nets
) -> None:
    family = models.family_of(folders[base], "lora")
    how = How("euler", STEPS, GUIDANCE, STRENGTH, "64/h", (1.0,))
    exact = drawn(Drawer(family, nets(base)[:1], shown("mask", 1), how), PROMPTS, SEEDS)
    branch = copy.deepcopy(nets(base)[0])
    draw.lower(branch, torch.bfloat16)
    draw.lower(family.denoiser, torch.bfloat16)
    seen: list[tuple[torch.dtype, ...]] = []

    def note(_: Any, args: Any, named: dict[str, Any], output: Any) -> None:
        told = named.get("added_cond_kwargs") or {"time_ids": torch.zeros(1)}
        inside = (args[0], named["encoder_hidden_states"], named["mid_block_additional_residual"])
        seen.append((*(t.dtype for t in inside), args[1].dtype, told["time_ids"].dtype, output[0].dtype))

    family.denoiser.register_forward_hook(note, with_kwargs=True)
    rough = drawn(Drawer(family, [branch], shown("mask", 1), how), PROMPTS, SEEDS)
    low, full = torch.bfloat16, torch.float32
    assert seen == [(low, low, low, full, full, full)] * int(STEPS * STRENGTH)
    for has, wants in zip(rough, exact, strict=True):
        assert 0 < np.abs(has.astype(int) - wants).mean() < 4


@pytest.mark.parametrize(
    "how, mode, error",
    [
        (How("ddim", 0, 1.0), "text", "--steps 0: expected 1 to 1000"),
        (How("ddim", 1001, 1.0), "text", "--steps 1001: expected 1 to 1000"),
        (How("ddim", 4, 1.0, 0.2), "image", "--strength 0.2 of --steps 4 is less than one step"),
        (How("ddmi", 4, 1.0), "text", "--sampler ddmi: unknown; did you mean ddim"),
    ],
)
def test_mistakes(how: How, mode: str, error: str, folders: dict[str, Path], models: ModuleType) -> None:
    with pytest.raises(UserError, match=error):
        Drawer(models.family_of(folders["sd1"], "lora"), [], shown(mode), how)
