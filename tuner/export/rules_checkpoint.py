"""What a tool does with a whole checkpoint in the original layout, by its rules in tools.py."""

from __future__ import annotations

import torch

from tuner.export import original
from tuner.export.contents import Contents
from tuner.export.places import Base, Shapes
from tuner.export.rules import Verdict
from tuner.export.rules_controlnet import published
from tuner.export.tools import CHECKPOINTS

_ASIDE = (".position_ids", "logit_scale", ".attn_mask")  # kept beside the weights, read by none


def expected(base: Base) -> Shapes:
    """The UNet's and text encoders' tensors of a checkpoint, with those that the layout adds."""
    found: Shapes = {}
    for component, tensors in base.tensors.items():
        state = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
        named = original.component_to_original(component, state, base.configs[component], base.family)
        prefix = original.PLACES[base.family][component]
        found |= {prefix + key: tuple(tensor.shape) for key, tensor in named.items()}
    return found


def judge(tool: str, contents: Contents, base: Base) -> Verdict:
    """What a tool does with a checkpoint on a base; of its autoencoder only whether there is one.

    Raises:
        KeyError: a tool without rules for checkpoints.
        LayoutError: the base has no place in the original layout.
    """
    verdict, wanted = Verdict(tool, len(contents.shapes)), expected(base)
    places = original.PLACES[base.family]
    inside = tuple(prefix for name, prefix in places.items() if name != "vae")
    strange = [
        k for k in contents.shapes if k.startswith(inside) and k not in wanted and not k.endswith(_ASIDE)
    ]
    verdict.act("drops", strange, "the base has no such tensor")
    verdict.missing = [key for key in wanted if key not in contents.shapes and not _added(key, base)]
    if not any(key.startswith(places["vae"]) for key in contents.shapes):
        verdict.missing.append(f"{places['vae']}*")
    for key, shape in contents.shapes.items():
        if wanted.get(key, shape) != shape:
            verdict.refused = f"{key} is {list(shape)}, the base's is {list(wanted[key])}"
    sizes = CHECKPOINTS[tool].sizes
    if (sizes == "published" and not published(base)) or (sizes == "detected" and not detected(base)):
        verdict.refuse_base("it does not recognise a base of this size")
    return verdict


def detected(base: Base) -> bool:
    """Whether ComfyUI tells the family by the UNet's sizes: measured, and SDXL only as published."""
    if base.family == "sdxl":
        return published(base)
    linear, text = bool(base.unet.get("use_linear_projection")), base.unet.get("cross_attention_dim")
    return base.unet["block_out_channels"][0] == 320 and (text, linear) in ((768, False), (1024, True))


def _added(key: str, base: Base) -> bool:
    """What the layout has beside the folder's tensors: readers do without."""
    if key.endswith("logit_scale"):
        return True
    if base.family != "sd2":
        return False
    layers = base.configs["text_encoder"]["num_hidden_layers"]
    return key.endswith(".text_projection") or f".resblocks.{layers}." in key
