"""What a tool does with a ControlNet's file, by its rules in tools.py; with a low-rank one, by those here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from tuner.export import cldm, control_lora
from tuner.export.contents import Contents
from tuner.export.kohya import original_path
from tuner.export.places import Base, Shapes, controlnet_tensors, widths_of_heads
from tuner.export.rules import Verdict
from tuner.export.tools import CONTROLNETS, Does

HINT = {"diffusers": "controlnet_cond_embedding.conv_in.weight", "cldm": "input_hint_block.0.weight"}
_PUBLISHED = (  # channels, width of the text, linear projections
    ((320, 640, 1280, 1280), 768, False),
    ((320, 640, 1280, 1280), 1024, True),
    ((320, 640, 1280), 2048, True),
)
_LATENT, _FIRST = 4, "input_blocks.0.0.weight"
_VERSIONS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "xl"}  # what A1111 looks for in a file's name


def layout(contents: Contents) -> str | None:
    """`diffusers` or `cldm` names; None where it is no ControlNet, or a low-rank one."""
    if is_low_rank(contents):
        return None
    bare = {key.removeprefix(cldm.PREFIX) for key in contents.shapes}
    return next((name for name, key in HINT.items() if key in bare), None)


def expected(contents: Contents, base: Base) -> Shapes:
    """The tensors that a ControlNet of this base has, in the file's own layout and prefix."""
    found = layout(contents)
    assert found is not None, "no ControlNet"
    prefix = cldm.PREFIX if any(key.startswith(cldm.PREFIX) for key in contents.shapes) else ""
    told = {**base.unet, "conditioning_channels": contents.shapes[prefix + HINT[found]][1]}
    first = contents.shapes.get(prefix + ("conv_in.weight" if found == "diffusers" else _FIRST), ())
    if len(first) == 4 and first[1] == _LATENT:  # an inpainting base's ControlNet sees the noisy latent alone
        told["in_channels"] = _LATENT
    tensors = controlnet_tensors(told)
    if found == "diffusers":
        return tensors
    hint = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
    names = cldm.controlnet_names({**base.unet, **hint})
    return {prefix + _renamed(key, names): shape for key, shape in tensors.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    module, _, kind = key.rpartition(".")
    return f"{original_path(module, names)}.{kind}"


def judge(tool: str, contents: Contents, base: Base) -> Verdict:
    """What a tool does with a ControlNet, complete or low-rank, on a base.

    Raises:
        KeyError: a tool without rules for ControlNets.
    """
    if is_low_rank(contents):
        return _judge_low_rank(tool, contents, base)
    rules, verdict, found = CONTROLNETS[tool], Verdict(tool, len(contents.shapes)), layout(contents)
    assert found is not None, "no ControlNet"
    wanted = expected(contents, base)
    strange = [key for key in contents.shapes if key not in wanted]
    verdict.act("drops", strange, "a ControlNet of this base has no such tensor")
    if misfits := [key for key, shape in contents.shapes.items() if wanted.get(key, shape) != shape]:
        key = misfits[0]
        sizes = f"is {list(contents.shapes[key])}, the base's is {list(wanted[key])}"
        verdict.refused = f"{key} {sizes} ({len(misfits)} of {verdict.keys} keys)"
    if missing := [key for key in wanted if key not in contents.shapes]:
        if rules.lacking == "refuses":
            verdict.refused = f"{missing[0]} is missing ({len(missing)} keys)"
        verdict.missing = missing
    if found in rules.sizes and not published(base):
        verdict.refuse_base(f"it knows only the published sizes in {found} names")
    if base.family in rules.refuses.get(found, ()):
        verdict.refuse_base(f"it does not read a {base.family} ControlNet in {found} names")
    _effects(verdict, tool, contents, base, found)
    return verdict


def published(base: Base) -> bool:
    """Whether the base's UNet has the size of SD 1.x, 2.x or XL as published."""
    size = (tuple(base.unet["block_out_channels"]), base.unet.get("cross_attention_dim"))
    return (*size, bool(base.unet.get("use_linear_projection"))) in _PUBLISHED and (
        base.unet["layers_per_block"] == 2
    )


def _effects(verdict: Verdict, tool: str, contents: Contents, base: Base, found: str) -> None:
    """What is loaded and yet works otherwise."""
    rules, stem = CONTROLNETS[tool], contents.name.removesuffix(".safetensors")
    like_sd15 = base.unet["block_out_channels"][0] == 320 and base.family == "sd1"
    others = sorted(set(widths_of_heads(base.unet)) - {64})
    if rules.heads and found == "cldm" and not like_sd15 and others:
        verdict.unfit = verdict.unfit or f"heads {', '.join(map(str, others))} wide, it makes them 64 wide"
    if why := misnamed(tool, contents.name, base.family):
        verdict.wrong |= dict.fromkeys(contents.shapes, why)
    if rules.eight:
        if base.family == "sd2":
            verdict.cautions.append("it gives the attention of every SD 2 ControlNet 8 heads")
        if _VERSIONS[base.family] not in stem:
            verdict.cautions.append(f"it tells the version by {_VERSIONS[base.family]} in the file's name")


def misnamed(tool: str, name: str, family: str) -> str:
    """What a tool takes a complete ControlNet for by its file's name alone; empty for a ControlNet."""
    rules, stem = CONTROLNETS[tool], name.removesuffix(".safetensors")
    if rules.pools and family in rules.pooled and re.fullmatch(rules.pools, stem):
        return f"the file's name, {name}, turns on the averaging that is meant for shuffled pictures"
    if rules.faces and re.fullmatch(rules.faces, stem):
        return f"the file's name, {name}, makes it read faces in place of prompts, as for InstantID"
    return ""


class LowRank(NamedTuple):
    """How a tool reads the factors of a low-rank ControlNet (Control-LoRA; see control_lora.py).

    Attributes:
        stranger: what it does at a tensor that the branch does not have.
        refuses: families of bases for which it builds another network.
        published: it builds networks of the published sizes alone.
        layers: it takes every base for one of so many layers a level.
        lacks: it has nothing in place of norms and biases that are not in the file.
        biases: it reads those of layers with factors; else they stay the base's.
        holes: it makes branches for inpainting bases, which see the noisy latent alone.
    """

    stranger: Does = "refuses"
    refuses: tuple[str, ...] = ()
    published: bool = False
    layers: int | None = None
    lacks: bool = False
    biases: bool = True
    holes: bool = True


CONTROL_LORAS: Mapping[str, LowRank] = {
    "diffusers": LowRank("drops", layers=2, biases=False, holes=False),
    "ComfyUI": LowRank(),
    "Forge": LowRank(),
    "sd-webui-controlnet": LowRank("drops", ("sd2",), published=True, lacks=True),
}
_OWN = ("input_hint_block.", "zero_convs.", "middle_block_out.")  # what a base has no counterpart for


def is_low_rank(contents: Contents) -> bool:
    """Whether a file holds the factors of a ControlNet."""
    return control_lora.MARKER in contents.shapes


def expected_whole(contents: Contents, base: Base) -> Shapes:
    """The tensors that the complete ControlNet has, in the names of the low-rank one's file.

    An inpainting base's ControlNet sees fewer channels than the base; then its first weight is there whole.
    """
    hint, first = (contents.shapes.get(key) for key in (HINT["cldm"], _FIRST))
    told = {**base.unet, "conditioning_embedding_out_channels": (16, 32, 96, 256)}
    for key, shape in (("conditioning_channels", hint), ("in_channels", first)):
        if shape is not None and len(shape) == 4:
            told[key] = shape[1]
    names = cldm.controlnet_names(told)
    return {_renamed(key, names): shape for key, shape in controlnet_tensors(told).items()}


def problems(contents: Contents, base: Base) -> dict[str, str]:
    """What is wrong with a low-rank file's keys on a base; `""` where a key has no place in its branch."""
    wanted, shapes = expected_whole(contents, base), contents.shapes
    found: dict[str, str] = {}
    for key, shape in shapes.items():
        path, _, end = key.rpartition(".")
        weight = wanted.get(f"{path}.weight", ())
        if key == control_lora.MARKER:
            continue
        if end not in ("up", "down"):
            if wanted.get(key) != shape:
                found[key] = f"is {list(shape)}, the base's is {list(wanted[key])}" if key in wanted else ""
        elif len(weight) < 2 or key.startswith(_OWN):
            found[key] = ""
        elif (other := shapes.get(f"{path}.{'down' if end == 'up' else 'up'}")) is None:
            found[key] = "lacks its other factor"
        elif not _fit(*((shape, other) if end == "up" else (other, shape)), weight):
            found[key] = f"is {list(shape)} beside {list(other)}, the base's weight is {list(weight)}"
    return found


def _fit(up: tuple[int, ...], down: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether two factors make a change of a weight's size."""
    if min(len(up), len(down)) < 2 or math.prod(up[1:]) != down[0]:
        return False
    return (up[0], math.prod(down[1:])) == (weight[0], math.prod(weight[1:]))


def _judge_low_rank(tool: str, contents: Contents, base: Base) -> Verdict:
    rules, verdict = CONTROL_LORAS[tool], Verdict(tool, len(contents.shapes))
    wrong = problems(contents, base)
    if strange := [key for key, why in wrong.items() if not why]:
        verdict.act(rules.stranger, strange, f"a ControlNet of this base has no tensor {strange[0]}")
    if misfits := [f"{key} {why}" for key, why in wrong.items() if why]:
        verdict.refused = f"{misfits[0]} ({len(misfits)} of {verdict.keys} keys)"
    verdict.missing = [
        key
        for key, shape in expected_whole(contents, base).items()
        if key not in contents.shapes and (key.startswith(_OWN) or (rules.lacks and len(shape) == 1))
    ]
    if rules.published and not published(base):
        verdict.refuse_base("it knows only the published sizes")
    if base.family in rules.refuses:
        verdict.refuse_base(f"it takes a low-rank ControlNet of {base.family} for one of another base")
    if rules.layers not in (None, base.unet["layers_per_block"]):
        verdict.unfit = verdict.unfit or f"it places layers as on a base of {rules.layers} a level"
    if not rules.holes and base.unet.get("in_channels", _LATENT) != _LATENT:
        verdict.refuse_base("it makes no branch of an inpainting base")
    if not rules.biases:
        verdict.cautions.append("it leaves the biases beside factors at the base's")
    if rules.published and _VERSIONS[base.family] not in contents.name:
        verdict.cautions.append(f"it tells the version by {_VERSIONS[base.family]} in the file's name")
    return verdict
