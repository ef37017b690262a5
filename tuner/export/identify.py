"""What a safetensors file is, by its keys, shapes and metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tuner.export import peft_format
from tuner.export.contents import Contents
from tuner.export.rules_controlnet import is_low_rank, layout
from tuner.export.spelling import LORA, Key, split

ADAPTERS = ("LoRA", "DoRA", "LoHa", "LoKr", "full differences", "adapter of several kinds")
_COMPONENTS = {  # a key that only this component has, or its last part -> the component
    "conv_norm_out.weight": "UNet",
    "decoder.conv_norm_out.weight": "autoencoder",
    "visual_projection.weight": "image encoder",
    "text_projection.weight": "text encoder with projection",
    "text_model.final_layer_norm.weight": "text encoder",
    "final_layer_norm.weight": "text encoder",
}
_CHECKPOINT = ("model.diffusion_model.", "cond_stage_model.", "conditioner.embedders.", "first_stage_model.")
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # of the text that cross-attention reads
_VECTORS = {768: "sd1", 1024: "sd2"}  # of a word's vector
_MOST_VECTORS = 75  # that fit into a prompt


class Identity(NamedTuple):
    """What a file is.

    Attributes:
        kind: LoRA, DoRA, LoHa, LoKr, full differences, adapter of several kinds, embedding, ControlNet,
            Control-LoRA, checkpoint, UNet, autoencoder, text encoder ..., or unknown.
        layout: how its keys are spelled: kohya, kohya (original names), peft, diffusers (before peft),
            diffusers, cldm, original, one tensor, clip_l + clip_g, several tensors.
        family: sd1, sd2, sdxl, or None where it does not show.
        ranks: rank -> how many modules have it.
        alphas: alpha -> how many modules have it; modules without are not counted.
        networks: unet, text_encoder, text_encoder_2 -> how many modules it changes.
        tokens: the words that a file of vectors holds -> how many vectors.
        dtypes: type -> how many tensors.
    """

    kind: str
    layout: str
    family: str | None
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    networks: Mapping[str, int]
    tokens: Mapping[str, int]
    dtypes: Mapping[str, int]


def identify(contents: Contents) -> Identity:
    """What a file is; never an error, `unknown` at worst."""
    plain = Identity("unknown", "", None, {}, {}, {}, {}, dict(Counter(contents.dtypes.values())))
    if is_low_rank(contents):
        found = _low_rank(contents, plain)
    else:
        found = _adapter(contents, plain) or _whole(contents, plain) or _embedding(contents, plain) or plain
    return found._replace(family=found.family or _told_family(contents.metadata))


def _told_family(metadata: Mapping[str, str]) -> str | None:
    """The family that the metadata names."""
    version, architecture = (
        metadata.get("ss_base_model_version", ""),
        metadata.get("modelspec.architecture", ""),
    )
    for prefix, family in (
        ("sdxl_", "sdxl"),
        ("sd_v2", "sd2"),
        ("sd_v1", "sd1"),
        ("stable-diffusion-xl", "sdxl"),
        ("stable-diffusion-v2", "sd2"),
        ("stable-diffusion-v1", "sd1"),
    ):
        if version.startswith(prefix) or architecture.startswith(prefix):
            return family
    return None


def _adapter(contents: Contents, plain: Identity) -> Identity | None:
    keys = {key: found for key in contents.shapes if (found := split(key)) is not None}
    modules: dict[str, set[str]] = {}
    for found in keys.values():
        modules.setdefault(found.name, set()).add(found.dialect)
    if len(keys) * 2 <= len(contents.shapes) or not modules:
        return None
    settings = _settings(contents.metadata)
    ranks = Counter(contents.shapes[key][0] for key, found in keys.items() if _tells_rank(key, found, keys))
    alphas = Counter(contents.alphas.values())
    if not alphas and settings:
        alphas = Counter(float(value) for key, value in settings.items() if key.endswith(".lora_alpha"))
    networks = Counter(_network(name) for name in modules)
    return plain._replace(
        kind=_kind(keys.values()),
        layout=_layout(modules),
        family=_family(contents, modules),
        ranks=dict(sorted(ranks.items())),
        alphas=dict(sorted(alphas.items())),
        networks=dict(sorted(networks.items())),
    )


def _tells_rank(key: str, found: Key, keys: Mapping[str, Key]) -> bool:
    """Whether this is the one tensor of its module whose rows are as many as the rank."""
    if found.dialect not in ("loha", "lokr"):
        return found.role == "down"
    return found.role == "w2_b" or (found.role == "w1_b" and key.replace("w1_b", "w2_b") not in keys)


def _settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        return dict(json.loads(metadata.get(peft_format.METADATA, "{}")))
    except (ValueError, TypeError):
        return {}


def _kind(keys: Collection[Key]) -> str:
    """The kind of an adapter, by what its keys end in."""
    roles = {found.role for found in keys}
    names = {"loha": "LoHa", "lokr": "LoKr", "diff": "full differences", "norm": "full differences"}
    kinds = {names.get(found.dialect, "LoRA") for found in keys if found.dialect != "any"}
    if len(kinds) != 1:
        return "adapter of several kinds"
    kind = kinds.pop()
    return "DoRA" if kind == "LoRA" and roles & {"dora", "magnitude"} else kind


def _layout(modules: Mapping[str, set[str]]) -> str:
    if all(name.startswith("lora_") for name in modules):
        original = any("put_blocks_" in name or "middle_block_" in name for name in modules)
        return "kohya (original names)" if original else "kohya"
    if any(".processor" in name for name in modules):
        return "diffusers (before peft)"
    if all(dialects & {*LORA[1:], "any"} for dialects in modules.values()):
        return "peft"
    return "mixed"


def _network(name: str) -> str:
    """The component that a module's name belongs to."""
    for prefix, component in (
        ("lora_te2_", "text_encoder_2"),
        ("lora_te", "text_encoder"),
        ("text_encoder_2.", "text_encoder_2"),
        ("text_encoder.", "text_encoder"),
        ("bundle_emb.", "embeddings"),
    ):
        if name.startswith(prefix):
            return component
    return "unet"


def _family(contents: Contents, modules: Mapping[str, set[str]]) -> str | None:
    """The family that names and sizes show: a second text encoder, the text's width in cross-attention."""
    if any(_network(name) == "text_encoder_2" or "add_embedding" in name for name in modules):
        return "sdxl"
    for key, shape in contents.shapes.items():
        if "attn2" in key and ("to_k" in key or "to_v" in key) and len(shape) == 2:
            found = split(key)
            if found is not None and found.role in ("down", "weight") and shape[1] in _WIDTHS:
                return _WIDTHS[shape[1]]
    if any("input_blocks" in name or "output_blocks" in name for name in modules):
        deep = any("transformer_blocks_1_" in name or "transformer_blocks.1." in name for name in modules)
        return "sdxl" if deep else None
    for key, shape in contents.shapes.items():
        if "text_model_encoder_layers_0_self_attn_q_proj.lora_down" in key:
            return {768: "sd1", 1024: "sd2"}.get(shape[1]) if "lora_te_" in key else None
    return None


def _whole(contents: Contents, plain: Identity) -> Identity | None:
    """A network or several of them."""
    shapes = contents.shapes
    if found := layout(contents):
        return plain._replace(kind="ControlNet", layout=found, family=_unet_family(contents))
    if any(key.startswith(_CHECKPOINT) for key in shapes):
        return plain._replace(kind="checkpoint", layout="original", family=_unet_family(contents))
    for key, kind in _COMPONENTS.items():
        if key in shapes:
            family = _unet_family(contents) if kind == "UNet" else None
            return plain._replace(kind=kind, layout="diffusers", family=family)
    return None


def _low_rank(contents: Contents, plain: Identity) -> Identity:
    """The factors of a ControlNet; they show the text's width where complete ones have it in a weight."""
    downs = {key: shape for key, shape in contents.shapes.items() if key.endswith(".down") and len(shape) > 1}
    widths = [shape[1] for key, shape in downs.items() if key.endswith("attn2.to_k.down")]
    told = "sdxl" if any(key.startswith("label_emb.") for key in contents.shapes) else None
    return plain._replace(
        kind="Control-LoRA",
        layout="cldm",
        family=told or _WIDTHS.get(next(iter(widths), 0)),
        ranks=dict(sorted(Counter(shape[0] for shape in downs.values()).items())),
    )


def _unet_family(contents: Contents) -> str | None:
    """The family of a UNet or ControlNet."""
    shapes = contents.shapes
    if any("label_emb.0.0." in key or key.startswith("add_embedding.linear_1.") for key in shapes):
        return "sdxl"
    keys = [key for key in shapes if key.endswith("attn2.to_k.weight")]
    linear = any(len(shapes[key]) == 2 for key in shapes if key.endswith("proj_in.weight"))
    width = shapes[keys[0]][1] if keys else None
    return _WIDTHS.get(width or 0) or ("sd2" if linear else "sd1" if keys else None)


def _embedding(contents: Contents, plain: Identity) -> Identity | None:
    """Vectors of new words: few, all of one width."""
    shapes = contents.shapes
    if not shapes or not all(_is_vectors(shape) for shape in shapes.values()):
        return None
    pair = {"clip_l", "clip_g"} <= shapes.keys()
    tokens = {key: shape[0] if len(shape) == 2 else 1 for key, shape in shapes.items()}
    if pair:
        stem = contents.name.removesuffix(".safetensors")
        tokens = {stem: tokens["clip_l"]}
    layout_ = "clip_l + clip_g" if pair else "one tensor" if len(shapes) == 1 else "several tensors"
    widths = {shape[-1] for shape in shapes.values()}
    family = "sdxl" if pair else _VECTORS.get(widths.pop()) if len(widths) == 1 else None
    return plain._replace(kind="embedding", layout=layout_, family=family, tokens=tokens)


def _is_vectors(shape: tuple[int, ...]) -> bool:
    return len(shape) == 1 or (len(shape) == 2 and 1 <= shape[0] <= _MOST_VECTORS)
