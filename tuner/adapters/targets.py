"""Which layers get adapters, and of which rank: presets and regular expressions over module paths.

A path has its component in front: `unet.down_blocks.0.attentions.0.proj_in`. A regular expression has to fit
the whole path.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from tuner.errors import UserError
from tuner.export.spelling import BLOCKS, PROJECTIONS
from tuner.family import Family

SHOWN = 3  # names that a message gives


class Preset(NamedTuple):
    """A choice of layers by name.

    Attributes:
        unet, text: regular expressions over the paths in a UNet and in a text encoder.
        convolutions: besides linear layers.
    """

    unet: str
    text: str
    convolutions: bool = False


_ATTENTION = r"to_q|to_k|to_v|to_out\.0"
PRESETS: Mapping[str, Preset] = {
    "attention": Preset(rf".*\.({_ATTENTION})", r".*\.(q_proj|k_proj|v_proj|out_proj)"),
    "attention+feed-forward": Preset(rf".*\.({_ATTENTION}|ff\.net\.0\.proj|ff\.net\.2)", PROJECTIONS),
    # Not the first, last and time layers, nor text_projection: kohya's tools read no adapters there.
    "all-linear": Preset(BLOCKS, PROJECTIONS),
    "all": Preset(BLOCKS, PROJECTIONS, convolutions=True),
}


class TargetError(UserError):
    """Targets or patterns that fit no layer, or layers that cannot be had together."""


class Slot(NamedTuple):
    """The adapter of one layer."""

    rank: int
    alpha: float
    learning_rate: float | None = None  # None: its network's


class Wish(NamedTuple):
    """What is wanted of the layers whose paths fit; None: as for all."""

    match: str
    rank: int | None = None
    alpha: float | None = None
    learning_rate: float | None = None


def layers(family: Family, components: Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers and convolutions of some networks by path, but for those that nothing reads."""
    return {
        f"{component}.{name}": module
        for component in components
        for name, module in family.modules()[component].named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not is_unread(family, f"{component}.{name}")
    }


def is_unread(family: Family, path: str) -> bool:
    """Whether nothing reads what this layer gives: an adapter there would never learn."""
    component, _, name = path.partition(".")
    if component not in family.text_encoders:
        return False
    return any(f"{name}.".startswith(f"{unread}.") for unread in family.unread(component))


def select(targets: str | Sequence[str], found: Mapping[str, nn.Module]) -> list[str]:
    """The paths that a preset, or one of several regular expressions, stands for, in the networks' order.

    Raises:
        TargetError: a regular expression fits no layer.
    """
    if isinstance(targets, str) and targets in PRESETS:
        return [path for path, layer in found.items() if _is_in(PRESETS[targets], path, layer)]
    chosen: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else targets:
        fitting = {path for path in found if re.fullmatch(pattern, path)}
        if not fitting:
            known = (
                f"neither a preset ({', '.join(PRESETS)}) nor a regular expression for a layer's whole path"
            )
            raise TargetError(f"method.lora.targets: {pattern}: {known}{_near(pattern, found)}")
        chosen |= fitting
    return [path for path in found if path in chosen]


def plan(slots: Mapping[str, Slot], wishes: Sequence[Wish]) -> dict[str, Slot]:
    """The slots with what is wanted of some of them; of the wishes that fit a path the first counts.

    Raises:
        TargetError: a wish fits no path, or none that an earlier one leaves.
    """
    made = dict(slots)
    taken: dict[str, str] = {}
    for wish in wishes:
        fitting = [path for path in slots if re.fullmatch(wish.match, path)]
        if not fitting:
            missing = f"fits no layer that has an adapter{_near(wish.match, slots)}"
            raise TargetError(f"method.lora.patterns: {wish.match}: {missing}")
        left = [path for path in fitting if path not in taken]
        if not left:
            before = " and ".join(dict.fromkeys(taken[path] for path in fitting))
            message = f"has no effect: the first pattern that fits counts, and {before} has all of its layers"
            raise TargetError(f"method.lora.patterns: {wish.match}: {message}")
        for path in left:
            taken[path], slot = wish.match, slots[path]
            made[path] = Slot(
                slot.rank if wish.rank is None else wish.rank,
                slot.alpha if wish.alpha is None else wish.alpha,
                wish.learning_rate,
            )
    return made


def _is_in(preset: Preset, path: str, layer: nn.Module) -> bool:
    component, _, name = path.partition(".")
    pattern = preset.unet if component == "unet" else preset.text
    return (preset.convolutions or isinstance(layer, nn.Linear)) and re.fullmatch(pattern, name) is not None


def _near(pattern: str, paths: Iterable[str]) -> str:
    """Names like a pattern, as the end of a message."""
    if like := difflib.get_close_matches(pattern, PRESETS, 1):
        return f"; did you mean {like[0]}?"
    plain = re.sub(r"\\|\.\*|[\^$()?+]", "", pattern)  # without the signs of regular expressions

    def alike(path: str) -> tuple[int, int]:
        blocks = difflib.SequenceMatcher(None, plain, path, autojunk=False).get_matching_blocks()
        return sum(block.size for block in blocks), -len(path)

    near = sorted(paths, key=alike, reverse=True)[:SHOWN]
    return f"; near are {', '.join(near)}" if near else "; there is no layer to choose from"
