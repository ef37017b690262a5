"""What `tuner sample` does, from the options to the files; reads top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tuner import device, guidance, samplers
from tuner.errors import UserError
from tuner.family import Family
from tuner.generate import attach, draw, keep, shown, source
from tuner.generate.asked import Asked
from tuner.generate.attach import Net
from tuner.generate.draw import Drawer, How
from tuner.generate.source import Source
from tuner.generate.words import Words
from tuner.method import public_config
from tuner.progress import say
from tuner.sample import Picture, sheet

STEPS, GUIDANCE = 25, 7.0
STRENGTH = 0.6  # of a picture without mask; within a mask all is drawn anew


class Plan(NamedTuple):
    """What was asked for, with every default in its place.

    Attributes:
        found: the base and the adapters.
        nets: the ControlNets.
        how: sampler, steps and so on.
        negative: the negative prompt.
        dtype: what the denoiser computes in.
        wanted: for each picture the number of its prompt and its seed.
        places: where each is kept.
    """

    found: Source
    nets: list[Net]
    how: How
    negative: str
    dtype: torch.dtype
    wanted: list[tuple[int, int]]
    places: list[Path]


@torch.no_grad()
def make(asked: Asked) -> list[Path]:
    """Draw what is asked for; the files written, of each prompt all its pictures.

    Picture i of every prompt has the seed `--seed` + i: the same prompt and seed are the same picture, alone
    or among others, bitwise with `--batch 1` and within rounding else.

    Raises:
        UserError: what the user can mend.
    """
    device.quiet()
    _check(asked)
    plan = _plan(asked)
    family = source.load(plan.found)
    branches = [attach.load_net(family, net.path) for net in plan.nets]
    attach.add_loras(family, plan.found.loras)
    words = Words(family, plan.found.embeddings)
    words.check([*asked.prompt, plan.negative])
    drawer = _drawer(asked, plan, family, branches)
    told = _about(asked, plan, family, words)
    made = draw.all_of(
        drawer,
        [words.encode(asked.prompt[number], f"prompt {number + 1}") for number, _ in plan.wanted],
        words.encode(plan.negative, "negative prompt"),
        [seed for _, seed in plan.wanted],
        asked.batch,
    )
    for place, (number, seed), picture in zip(plan.places, plan.wanted, made, strict=True):
        keep.write(place, picture, told.one(asked.prompt[number], seed, picture))
    if asked.grid is not None:
        keep.write_grid(asked.grid, sheet(_columns(asked, made), asked.prompt))
    say(f"{len(made)} picture{'s' if len(made) > 1 else ''} in {asked.out}")
    return plan.places


def _check(asked: Asked) -> None:
    """Raises UserError for a value out of range, or one that would have no effect."""
    samplers.known(asked.sampler, samplers.SAMPLERS, "--sampler")
    samplers.known(asked.precision, {"auto": None, **device.DTYPES}, "--precision")
    if asked.control_guidance is not None:
        samplers.known(asked.control_guidance, guidance.FORMULAS, "--control-guidance")
        if not asked.controlnet:
            raise UserError("--control-guidance has no effect without --controlnet")
    for name in ("count", "batch", "clip_skip", "windows"):
        if (value := getattr(asked, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if not asked.prompt:
        raise UserError('there is nothing to draw: give --prompt at least once (--prompt "" for none)')
    if asked.seed < 0:
        raise UserError(f"--seed {asked.seed}: expected 0 or more")
    for name in ("mask", "strength"):
        if asked.image is None and getattr(asked, name) is not None:
            raise UserError(f"--{name} has no effect without --image")
    if asked.strength is not None and not 0 < asked.strength <= 1:
        raise UserError(f"--strength {asked.strength:g}: expected above 0, and at most 1")
    if asked.grid is not None:
        keep.grid_format(asked.grid)


def _plan(asked: Asked) -> Plan:
    """Put the recipe's values and the defaults where nothing is asked; nothing heavy is loaded yet."""
    found = source.find(asked)
    own_name = found.recipe.name if found.recipe is not None else ""
    nets = [attach.parse_net(text, found.net, own_name) for text in asked.controlnet]
    if found.net is not None and not any(net.path == found.net for net in nets):
        raise UserError(
            f"--run {asked.run}: it trained a ControlNet; give its condition: --controlnet run:PICTURE"
        )
    preview = None if found.recipe is None else found.recipe.preview
    scale = asked.guidance if asked.guidance is not None else preview.guidance if preview else GUIDANCE
    negative = asked.negative if asked.negative is not None else preview.negative if preview else ""
    if scale < 1:
        raise UserError(f"--guidance {scale:g}: expected 1, which is none, or more")
    if scale == 1 and (other := "--negative" if asked.negative else _branches(asked.control_guidance)):
        raise UserError(f"{other} has no effect with --guidance 1: the prompt's prediction is taken alone")
    strength = 1.0
    if asked.image is not None:
        strength = asked.strength or (STRENGTH if asked.mask is None else 1.0)
    how = How(
        asked.sampler,
        asked.steps if asked.steps is not None else preview.steps if preview else STEPS,
        scale,
        strength,
        asked.control_guidance or guidance.BOTH,
        tuple(net.scale for net in nets),
    )
    seeds = range(asked.seed, asked.seed + asked.count)
    wanted = [(number, seed) for number in range(len(asked.prompt)) for seed in seeds]
    places = [keep.place(asked.out, number + 1, seed) for number, seed in wanted]
    keep.check_free(asked.out, [*places, *([asked.grid] if asked.grid else [])])
    return Plan(found, nets, how, negative, _dtype(asked.precision), wanted, places)


def _branches(choice: str | None) -> str:
    """The option, where all that it chooses is which branches are steered."""
    return f"--control-guidance {choice}" if choice in (guidance.BOTH, guidance.CONDITIONAL) else ""


def _dtype(asked: str) -> torch.dtype:
    if asked == "fp16" and not torch.cuda.is_available():
        raise UserError("--precision fp16 needs a GPU, and none is here; take bf16, fp32 or auto")
    return device.DTYPES[device.precision(asked)]


def _drawer(asked: Asked, plan: Plan, family: Family, branches: Sequence[nn.Module]) -> Drawer:
    """Put the networks where they compute, and the pictures to their size."""
    where = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    family.to(where)
    for network in (family.denoiser, *branches):
        network.to(where)
        if plan.dtype != torch.float32:
            draw.lower(network, plan.dtype)
    size = shown.choose_size(asked.size, asked.image, _usual(family, plan.found), family.factor)
    looks = [
        (net.picture, int(public_config(branch)["conditioning_channels"]))
        for net, branch in zip(plan.nets, branches, strict=True)
    ]
    drawer = Drawer(family, branches, shown.load(size, asked.image, asked.mask, looks), plan.how)
    how, count = plan.how, len(plan.wanted)
    say(
        f"{count} picture{'s' if count > 1 else ''} of {size[0]}x{size[1]} from {family.title} "
        f"({family.name}, {family.scheduler_config.get('prediction_type', 'epsilon')}): {how.sampler}, "
        f"{how.steps} steps, guidance {how.guidance:g}, {_short(plan.dtype)}, {where.type}"
    )
    if plan.nets:
        say(f"control guidance {how.control}: {guidance.FORMULAS[how.control]}")
    return drawer


def _usual(family: Family, found: Source) -> shown.Size:
    """The size that the recipe trains at, else the base's own."""
    if found.recipe is not None:
        side = found.recipe.data.side
        return side, side
    cells: Any = public_config(family.denoiser)["sample_size"]
    high, wide = (cells, cells) if isinstance(cells, int) else cells
    return wide * family.factor, high * family.factor


def _about(asked: Asked, plan: Plan, family: Family, words: Words) -> keep.About:
    found = plan.found
    adapters: list[dict[str, Any]] = [
        {"kind": name, "name": found.recipe.name if found.recipe else name} for name in found.own
    ]
    adapters += [{"kind": "lora", "name": part.path.stem, "weight": part.weight} for part in found.loras]
    adapters += [{"kind": "embedding", "name": word} for word in words.spelled]
    adapters += [{"kind": "controlnet", "name": net.name, "weight": net.scale} for net in plan.nets]
    started = "mask" if asked.mask else "image" if asked.image else ""
    return keep.About(
        family.title, family.name, plan.how, plan.negative, tuple(adapters), started, _short(plan.dtype)
    )


def _short(dtype: torch.dtype) -> str:
    """fp32 for torch.float32."""
    return next(name for name, known in device.DTYPES.items() if known == dtype)


def _columns(asked: Asked, made: Sequence[Picture]) -> dict[str, list[Picture]]:
    """The pictures of each seed, in the order of the prompts."""
    return {f"seed {asked.seed + i}": list(made[i :: asked.count]) for i in range(asked.count)}
