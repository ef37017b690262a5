"""What a tool does with a ControlNet's file, by its rules in tools.py."""

from __future__ import annotations

import re

from tuner.export import cldm
from tuner.export.contents import Contents
from tuner.export.kohya import original_path
from tuner.export.places import Base, Shapes, controlnet_tensors, widths_of_heads
from tuner.export.rules import Verdict
from tuner.export.tools import CONTROLNETS

HINT = {"diffusers": "controlnet_cond_embedding.conv_in.weight", "cldm": "input_hint_block.0.weight"}
_PUBLISHED = (  # channels, width of the text, linear projections
    ((320, 640, 1280, 1280), 768, False),
    ((320, 640, 1280, 1280), 1024, True),
    ((320, 640, 1280), 2048, True),
)
_VERSIONS = {"sd1": "sd15", "sd2": "sd21", "sdxl": "xl"}  # what A1111 looks for in a file's name


def layout(contents: Contents) -> str | None:
    """`diffusers` or `cldm` names; None where it is no ControlNet."""
    bare = {key.removeprefix(cldm.PREFIX) for key in contents.shapes}
    return next((name for name, key in HINT.items() if key in bare), None)


def expected(contents: Contents, base: Base) -> Shapes:
    """The tensors that a ControlNet of this base has, in the file's own layout and prefix."""
    found = layout(contents)
    assert found is not None, "no ControlNet"
    prefix = cldm.PREFIX if any(key.startswith(cldm.PREFIX) for key in contents.shapes) else ""
    channels = contents.shapes[prefix + HINT[found]][1]
    tensors = controlnet_tensors({**base.unet, "conditioning_channels": channels})
    if found == "diffusers":
        return tensors
    hint = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
    names = cldm.controlnet_names({**base.unet, **hint})
    return {prefix + _renamed(key, names): shape for key, shape in tensors.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    module, _, kind = key.rpartition(".")
    return f"{original_path(module, names)}.{kind}"


def judge(tool: str, contents: Contents, base: Base) -> Verdict:
    """What a tool does with a ControlNet on a base.

    Raises:
        KeyError: a tool without rules for ControlNets.
    """
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
        verdict.refused = f"it knows only the published sizes in {found} names"
    if base.family in rules.refuses.get(found, ()):
        verdict.refused = f"it does not read a {base.family} ControlNet in {found} names"
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
        attention = [key for key in contents.shapes if ".attn" in key]
        why = f"it makes heads 64 wide, the base's are {', '.join(map(str, others))}"
        verdict.wrong |= dict.fromkeys(attention, why)
    if rules.pools and re.fullmatch(rules.pools, stem):
        why = f"the file's name, {contents.name}, turns on the averaging that is meant for shuffled pictures"
        verdict.wrong |= dict.fromkeys(contents.shapes, why)
    if rules.eight:
        if base.family == "sd2":
            verdict.cautions.append("it gives the attention of every SD 2 ControlNet 8 heads")
        if _VERSIONS[base.family] not in stem:
            verdict.cautions.append(f"it tells the version by {_VERSIONS[base.family]} in the file's name")
