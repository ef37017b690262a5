"""A whole checkpoint in the layout of the original code (ldm; sgm for SDXL), from diffusers' names and back.

One table serves both directions. The UNet and the autoencoder are renamed (the autoencoder's attention is 1x1
convolutions in the original); so is CLIP's own text encoder, which SD1 and SDXL's first one keep in the names
that transformers had before 5.6. SD2 and SDXL's second text encoder are in OpenCLIP's names: query, key and
value are one tensor there, and the projection is transposed.

State dicts on the diffusers side have the names of transformers >= 5.6: a CLIPTextModel's without
`text_model.`, a CLIPTextModelWithProjection's with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tuner.export.cldm import LayoutError, inverse, rename, unet_names

State = Mapping[str, Tensor]
Config = Mapping[str, Any]

PLACES: Mapping[str, Mapping[str, str]] = {
    "sd1": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.transformer.",
    },
    "sd2": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "cond_stage_model.model.",
    },
    "sdxl": {
        "unet": "model.diffusion_model.",
        "vae": "first_stage_model.",
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""Where each family's components lie in a checkpoint: component -> how its keys begin."""

MARKERS = ("v_pred", "ztsnr")
"""Empty tensors by which ComfyUI and the web UIs see that an SDXL checkpoint predicts v, and at zero SNR."""

_SD2_BLOCKS = 24  # of OpenCLIP's ViT-H/14 text encoder; readers take what the last but one gives
_LOGIT_SCALE = math.log(
    100.0
)  # CLIP's is clipped there (arXiv 2103.00020, section 2.5); nothing here reads it

_VAE_RESNET = {part: part for part in ("norm1", "conv1", "norm2", "conv2")} | {
    "conv_shortcut": "nin_shortcut"
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_QKV = ("q", "k", "v")


def to_original(
    components: Mapping[str, State], configs: Mapping[str, Config], family: str
) -> dict[str, Tensor]:
    """State dicts of a family's components (diffusers, transformers) -> one checkpoint.

    Values are not touched, but for SD2 the file has what its folder has not: the last text block (the folder
    holds the 23 below it), `text_projection` and `logit_scale`. No reader uses their values, but strict ones
    want the keys: the block is written so that it passes its input on unchanged, the projection as the
    identity, the scale as CLIP's usual ln 100 (SDXL's second encoder gets that, too).

    Args:
        components: exactly those of `PLACES[family]`.
        configs: their configurations by component, and, if given, `scheduler`: an SDXL base that predicts v
            gets the empty tensors `MARKERS`, so that tools see it.
        family: `sd1`, `sd2` or `sdxl`.

    Raises:
        LayoutError: components or keys that are missing or that the layout has no place for.
    """
    places = _places(family)
    if sorted(components) != sorted(places):
        found = ", ".join(sorted(components))
        raise LayoutError(f"a checkpoint of {family} holds {', '.join(sorted(places))}; found {found}")
    whole: dict[str, Tensor] = {}
    for name, prefix in places.items():
        named = component_to_original(name, components[name], configs[name], family)
        whole |= {prefix + key: value for key, value in named.items()}
    scheduler = configs.get("scheduler", {})
    if family == "sdxl" and scheduler.get("prediction_type") == "v_prediction":
        zero = bool(scheduler.get("rescale_betas_zero_snr"))
        whole |= {marker: torch.zeros(0) for marker in MARKERS[: 1 + zero]}
    return whole


def from_original(state: State, configs: Mapping[str, Config], family: str) -> dict[str, dict[str, Tensor]]:
    """The inverse of `to_original`, exact: the components that the checkpoint holds, by name.

    Raises:
        LayoutError: a key outside the components (other than `MARKERS`), or one that a component has no place
            for, or a component that is there in part.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if key in MARKERS:
            continue
        for name, prefix in _places(family).items():
            if key.startswith(prefix):
                parts.setdefault(name, {})[key.removeprefix(prefix)] = value
                break
        else:
            raise LayoutError(f"{key}: belongs to no component of {family}")
    return {name: component_from_original(name, part, configs[name], family) for name, part in parts.items()}


def component_to_original(name: str, state: State, config: Config, family: str) -> dict[str, Tensor]:
    """One component's tensors under the keys of the original, without the component's own prefix.

    Raises:
        LayoutError: keys that are missing or that the layout has no place for.
    """
    if name.startswith("text_encoder"):
        bare = {key.removeprefix("text_model."): value for key, value in state.items()}
        if _is_open_clip(name, family):
            return _to_open_clip(name, bare, config, family)
        _check_complete(name, bare, clip_names(config), config)
        return {f"text_model.{key}": value for key, value in rename(bare, clip_names(config)).items()}
    names = vae_names(config) if name == "vae" else unet_names(config)
    named = rename(state, names)
    _check_complete(name, named, names.values(), config)
    if name == "vae":
        return {key: value[:, :, None, None] if _is_1x1(key) else value for key, value in named.items()}
    return named


def component_from_original(name: str, state: State, config: Config, family: str) -> dict[str, Tensor]:
    """The inverse of `component_to_original`.

    What the original keeps beside the weights is left out: `position_ids`, `logit_scale`, SD2's last text
    block and its `text_projection`, and the autoencoder's training loss (`loss.`).

    Raises:
        LayoutError: keys that are missing or that the component has no place for.
    """
    if name.startswith("text_encoder"):
        if _is_open_clip(name, family):
            return _from_open_clip(name, state, config, family)
        bare = {key.removeprefix("text_model."): value for key, value in state.items()}
        if len(bare) != len(state):
            raise LayoutError(f"{name}: the same key is there with and without text_model.")
        bare.pop("embeddings.position_ids", None)
        _check_complete(name, bare, clip_names(config), config)
        return rename(bare, clip_names(config))
    if name == "vae":
        state = {key: value for key, value in state.items() if not key.startswith("loss.")}
        state = {
            key: value[:, :, 0, 0] if _is_1x1(key) and value.ndim == 4 else value
            for key, value in state.items()
        }
    names = vae_names(config) if name == "vae" else unet_names(config)
    _check_complete(name, state, names.values(), config)
    return rename(state, inverse(names))


def vae_names(config: Config) -> dict[str, str]:
    """Module prefixes of an AutoencoderKL -> those of ldm's (without `first_stage_model.`).

    The original counts the decoder's levels as the encoder's: `up.0` is the one with the largest pictures.
    """
    levels, layers = len(config["block_out_channels"]), int(config["layers_per_block"])
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{part}": f"{half}.{part}" for part in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for index in (0, 1):
            names |= _vae_resnet(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}")
        for part, place in _VAE_ATTENTION.items():
            names[f"{half}.mid_block.attentions.0.{part}"] = f"{half}.mid.attn_1.{place}"
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for layer in range(layers):
            names |= _vae_resnet(f"encoder.down_blocks.{level}.resnets.{layer}", f"{down}.block.{layer}")
        for layer in range(layers + 1):
            names |= _vae_resnet(f"decoder.up_blocks.{level}.resnets.{layer}", f"{up}.block.{layer}")
        if level < levels - 1:
            names[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"{down}.downsample.conv"
            names[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"{up}.upsample.conv"
    return names


def clip_names(config: Config) -> dict[str, str]:
    """Module prefixes of a CLIPTextModel, which the original keeps (below `text_model.`)."""
    names = list(_OPEN_CLIP)
    for layer in range(int(config["num_hidden_layers"])):
        names += [f"encoder.layers.{layer}.{part}" for part in _OPEN_CLIP_LAYER]
        names += [f"encoder.layers.{layer}.self_attn.{which}_proj" for which in _QKV]
    return {name: name for name in names}


def open_clip_names(config: Config) -> dict[str, str]:
    """Prefixes of a CLIPTextModel -> those of OpenCLIP's text encoder, but for q, k, v and the projection."""
    names = dict(_OPEN_CLIP)
    for layer in range(int(config["num_hidden_layers"])):
        for part, place in _OPEN_CLIP_LAYER.items():
            names[f"encoder.layers.{layer}.{part}"] = f"transformer.resblocks.{layer}.{place}"
    return names


def _to_open_clip(name: str, state: State, config: Config, family: str) -> dict[str, Tensor]:
    layers, rest = int(config["num_hidden_layers"]), dict(state)
    if family == "sd2" and layers >= _SD2_BLOCKS:
        raise LayoutError(
            f"{name} has {layers} layers; readers of the original layout take what the last but one of "
            f"{_SD2_BLOCKS} gives, so that only {_SD2_BLOCKS - 1} have a place"
        )
    joined: dict[str, Tensor] = {}
    for layer in range(layers):
        for part in ("weight", "bias"):
            keys = [f"encoder.layers.{layer}.self_attn.{which}_proj.{part}" for which in _QKV]
            if missing := [key for key in keys if key not in rest]:
                raise LayoutError(f"{name}: {missing[0]} is missing")
            place = f"transformer.resblocks.{layer}.attn.in_proj_{part}"
            joined[place] = torch.cat([rest.pop(key) for key in keys])
    projection = rest.pop("text_projection.weight", None)
    names = open_clip_names(config)
    named = rename(rest, names)
    _check_complete(name, named, names.values(), config)
    table = named["token_embedding.weight"]
    if family == "sd2":
        joined |= _passing_block({**named, **joined}, layers - 1)
        joined["text_projection"] = torch.eye(table.shape[1], dtype=table.dtype, device=table.device)
    elif projection is None:
        raise LayoutError(f"{name}: text_projection.weight is missing")
    else:
        joined["text_projection"] = projection.T.contiguous()
    joined["logit_scale"] = torch.full((), _LOGIT_SCALE, dtype=table.dtype, device=table.device)
    return named | joined


def _from_open_clip(name: str, state: State, config: Config, family: str) -> dict[str, Tensor]:
    layers, rest = int(config["num_hidden_layers"]), dict(state)
    rest.pop("logit_scale", None)
    rest.pop("attn_mask", None)
    projection = rest.pop("text_projection", None)
    if family == "sd2":
        last = f"transformer.resblocks.{layers}."
        rest = {key: value for key, value in rest.items() if not key.startswith(last)}
    elif projection is None:
        raise LayoutError(f"{name}: text_projection is missing")
    split: dict[str, Tensor] = {}
    for layer in range(layers):
        for part in ("weight", "bias"):
            key = f"transformer.resblocks.{layer}.attn.in_proj_{part}"
            if key not in rest:
                raise LayoutError(f"{name}: {key} is missing")
            for which, piece in zip(_QKV, rest.pop(key).chunk(3), strict=True):
                split[f"encoder.layers.{layer}.self_attn.{which}_proj.{part}"] = piece
    names = open_clip_names(config)
    _check_complete(name, rest, names.values(), config)
    found = rename(rest, inverse(names)) | split
    if family == "sd2":
        return found
    assert projection is not None
    found = {f"text_model.{key}": value for key, value in found.items()}
    return found | {"text_projection.weight": projection.T.contiguous()}


def _passing_block(named: State, last: int) -> dict[str, Tensor]:
    """A block after the `last` one that adds nothing: both of its branches end in zeros."""
    before, after = f"transformer.resblocks.{last}.", f"transformer.resblocks.{last + 1}."
    block = {key.removeprefix(before): value for key, value in named.items() if key.startswith(before)}
    assert len(block) == 12, "a residual block has twelve tensors"
    return {
        after + key: torch.ones_like(value)
        if key in ("ln_1.weight", "ln_2.weight")
        else torch.zeros_like(value)
        for key, value in block.items()
    }


def _places(family: str) -> Mapping[str, str]:
    if family not in PLACES:
        raise LayoutError(f"unknown family {family!r}; known are {', '.join(PLACES)}")
    return PLACES[family]


def _is_open_clip(name: str, family: str) -> bool:
    return not PLACES[family][name].endswith(".transformer.")


def _is_1x1(key: str) -> bool:
    """Whether a key of the original autoencoder is a projection of its attention (a 1x1 convolution)."""
    return ".attn_1." in key and key.endswith(".weight") and ".norm." not in key


def _vae_resnet(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{place}" for part, place in _VAE_RESNET.items()}


def _check_complete(name: str, state: State, places: Iterable[str], config: Config) -> None:
    """Raises LayoutError where a place of the original layout gets no tensor."""
    filled = {key[:dot] for key in state for dot in _dots(key)}
    optional = ["skip_connection", "nin_shortcut"]  # only where the channels change
    if name == "vae":
        optional += [".attn_1."] if config.get("mid_block_add_attention") is False else []
    wanted = [place for place in places if not any(part in place for part in optional)]
    if missing := sorted(place for place in wanted if place not in filled):
        raise LayoutError(
            f"{name}: {missing[0]} is missing ({len(missing)} of {len(wanted)} places are empty)"
        )


def _dots(key: str) -> list[int]:
    """Where a key could be cut: at each dot, and at its end."""
    return [index for index, letter in enumerate(key) if letter == "."] + [len(key)]
