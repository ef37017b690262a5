"""Which tensors a base has, from its configurations alone: names and shapes, without loading weights.

Covers what Stable Diffusion 1.x, 2.x and XL are made of: UNet2DConditionModel, ControlNetModel and the CLIP
text encoders, in the names of diffusers and transformers (>= 5.6: a CLIPTextModel has no `text_model.`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tuner.errors import UserError

Shapes = dict[str, tuple[int, ...]]
Config = Mapping[str, Any]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
_UNKNOWN = (  # options of a UNet that add or change tensors, which no Stable Diffusion of these families uses
    "class_embed_type",
    "dual_cross_attention",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "reverse_transformer_layers_per_block",
    "time_cond_proj_dim",
    "time_embedding_dim",
)


class ConfigError(UserError):
    """A configuration whose tensors are not known here."""


class Base(NamedTuple):
    """A base model as file tools need it: what its networks are called and how large their layers are."""

    name: str  # as users call it
    family: str  # sd1, sd2, sdxl
    configs: Mapping[str, Config]  # by component
    tensors: Mapping[str, Shapes]  # by component: names of the state dict -> shapes

    @property
    def unet(self) -> Config:
        """The UNet's configuration."""
        return self.configs["unet"]

    def layers(self) -> Shapes:
        """Paths of all modules with a weight, their component first -> the weight's shape."""
        return {
            f"{component}.{name.removesuffix('.weight')}": shape
            for component, tensors in self.tensors.items()
            for name, shape in tensors.items()
            if name.endswith(".weight")
        }

    def adaptable(self) -> Shapes:
        """Those of the layers that a LoRA can sit on: linear ones and convolutions."""
        return {p: s for p, s in self.layers().items() if len(s) in (2, 4) and ".embeddings." not in p}


def base(name: str, configs: Mapping[str, Config]) -> Base:
    """A base from the configurations of its components (`unet`, `text_encoder`, `text_encoder_2`).

    Raises:
        ConfigError: there is no UNet, or a configuration is not of these families.
    """
    if "unet" not in configs:
        raise ConfigError(f"{name}: there is no unet/config.json")
    tables = {"unet": unet_tensors(configs["unet"])}
    tables |= {part: text_tensors(configs[part]) for part in COMPONENTS[1:] if part in configs}
    return Base(name, family_of(configs["unet"]), configs, tables)


def family_of(unet: Config) -> str:
    """`sdxl` is told sizes, `sd2` has linear projections or is 1024 wide in its text, `sd1` is the rest."""
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    wide = unet.get("cross_attention_dim") == 1024
    return "sd2" if wide or unet.get("use_linear_projection") else "sd1"


def unet_tensors(config: Config) -> Shapes:
    """Names and shapes of a UNet2DConditionModel's state dict.

    Raises:
        ConfigError: a kind of block or an option that these families do not have.
    """
    channels, layers = list(config["block_out_channels"]), _layers(config)
    tensors = _encoder(config)
    depths = _depths(config)[::-1]
    wide = [*channels[::-1], channels[0]]  # of each level from below, and what the last one meets
    previous = wide[0]
    for level, kind in enumerate(config["up_block_types"]):
        attention, out = _kind(_UP, kind), wide[level]
        for layer in range(layers + 1):
            skip = wide[level + 1] if layer == layers else out
            at = f"up_blocks.{level}"
            tensors |= _resnet(f"{at}.resnets.{layer}", previous + skip, out, channels[0])
            if attention:
                tensors |= _attention(f"{at}.attentions.{layer}", out, depths[level], config)
            previous = out
        if level < len(channels) - 1:
            tensors |= _conv(f"up_blocks.{level}.upsamplers.0.conv", out, out)
    tensors |= _norm("conv_norm_out", channels[0])
    return tensors | _conv("conv_out", channels[0], config.get("out_channels", 4))


def controlnet_tensors(config: Config) -> Shapes:
    """Names and shapes of a ControlNetModel's state dict.

    `config` may be that of the UNet it was cloned from: the condition encoder then has its usual channels.

    Raises:
        ConfigError: a kind of block or an option that these families do not have.
    """
    channels, layers = list(config["block_out_channels"]), _layers(config)
    tensors = _encoder(config)
    places = [channels[0]]
    for level, width in enumerate(channels):
        places += [width] * (layers + (level < len(channels) - 1))
    for index, width in enumerate(places):
        tensors |= _conv(f"controlnet_down_blocks.{index}", width, width, 1)
    tensors |= _conv("controlnet_mid_block", channels[-1], channels[-1], 1)
    hint = list(config.get("conditioning_embedding_out_channels", (16, 32, 96, 256)))
    at = "controlnet_cond_embedding"
    tensors |= _conv(f"{at}.conv_in", config.get("conditioning_channels", 3), hint[0])
    for index, (width, wider) in enumerate(zip(hint, hint[1:], strict=False)):
        tensors |= _conv(f"{at}.blocks.{2 * index}", width, width)
        tensors |= _conv(f"{at}.blocks.{2 * index + 1}", width, wider)
    return tensors | _conv(f"{at}.conv_out", hint[-1], channels[0])


def text_tensors(config: Config) -> Shapes:
    """Names and shapes of the state dict of a CLIPTextModel or CLIPTextModelWithProjection.

    Raises:
        ConfigError: `architectures` names something else.
    """
    kind = next(iter(config.get("architectures") or ["CLIPTextModel"]))
    if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise ConfigError(f"a text encoder of kind {kind}; known are CLIPTextModel and ...WithProjection")
    projected = kind == "CLIPTextModelWithProjection"
    width, inner, top = config["hidden_size"], config["intermediate_size"], "text_model." * projected
    tensors: Shapes = {
        f"{top}embeddings.token_embedding.weight": (config["vocab_size"], width),
        f"{top}embeddings.position_embedding.weight": (config.get("max_position_embeddings", 77), width),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"{top}encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= _linear(f"{at}.self_attn.{name}", width, width)
        tensors |= _norm(f"{at}.layer_norm1", width) | _norm(f"{at}.layer_norm2", width)
        tensors |= _linear(f"{at}.mlp.fc1", width, inner) | _linear(f"{at}.mlp.fc2", inner, width)
    tensors |= _norm(f"{top}final_layer_norm", width)
    if projected:
        tensors["text_projection.weight"] = (config["projection_dim"], width)
    return tensors


def _encoder(config: Config) -> Shapes:
    """What UNet and ControlNet share: embeddings, conv_in, the downward half and the middle."""
    if strange := [name for name in _UNKNOWN if config.get(name)]:
        raise ConfigError(f"{strange[0]}: {config[strange[0]]} is not known here")
    channels, layers, depths = list(config["block_out_channels"]), _layers(config), _depths(config)
    time = 4 * channels[0]
    tensors = _conv("conv_in", config.get("in_channels", 4), channels[0], config.get("conv_in_kernel", 3))
    tensors |= _linear("time_embedding.linear_1", channels[0], time)
    tensors |= _linear("time_embedding.linear_2", time, time)
    if added := config.get("addition_embed_type"):
        if added != "text_time":
            raise ConfigError(f"addition_embed_type: {added} is not known here, expected text_time or none")
        tensors |= _linear("add_embedding.linear_1", config["projection_class_embeddings_input_dim"], time)
        tensors |= _linear("add_embedding.linear_2", time, time)
    previous = channels[0]
    for level, kind in enumerate(config["down_block_types"]):
        attention, out, at = _kind(_DOWN, kind), channels[level], f"down_blocks.{level}"
        for layer in range(layers):
            tensors |= _resnet(f"{at}.resnets.{layer}", previous, out, channels[0])
            if attention:
                tensors |= _attention(f"{at}.attentions.{layer}", out, depths[level], config)
            previous = out
        if level < len(channels) - 1:
            tensors |= _conv(f"{at}.downsamplers.0.conv", out, out)
    if (middle := config.get("mid_block_type", "UNetMidBlock2DCrossAttn")) != "UNetMidBlock2DCrossAttn":
        raise ConfigError(f"mid_block_type: {middle} is not known here, expected UNetMidBlock2DCrossAttn")
    for index in range(2):
        tensors |= _resnet(f"mid_block.resnets.{index}", previous, previous, channels[0])
    return tensors | _attention("mid_block.attentions.0", previous, depths[-1], config)


def _resnet(at: str, width: int, out: int, first: int) -> Shapes:
    tensors = _norm(f"{at}.norm1", width) | _conv(f"{at}.conv1", width, out)
    tensors |= _linear(f"{at}.time_emb_proj", 4 * first, out)
    tensors |= _norm(f"{at}.norm2", out) | _conv(f"{at}.conv2", out, out)
    return tensors | (_conv(f"{at}.conv_shortcut", width, out, 1) if width != out else {})


def _attention(at: str, width: int, depth: int, config: Config) -> Shapes:
    tensors = _norm(f"{at}.norm", width)
    for name in ("proj_in", "proj_out"):
        linear = config.get("use_linear_projection")
        tensors |= _linear(f"{at}.{name}", width, width) if linear else _conv(f"{at}.{name}", width, width, 1)
    text = config.get("cross_attention_dim", 1280)
    if not isinstance(text, int):
        raise ConfigError(f"cross_attention_dim: {text} is not known here, expected one number")
    for index in range(depth):
        block = f"{at}.transformer_blocks.{index}"
        for name, source in (("attn1", width), ("attn2", text)):
            tensors[f"{block}.{name}.to_q.weight"] = (width, width)
            tensors[f"{block}.{name}.to_k.weight"] = tensors[f"{block}.{name}.to_v.weight"] = (width, source)
            tensors |= _linear(f"{block}.{name}.to_out.0", width, width)
        for name in ("norm1", "norm2", "norm3"):
            tensors |= _norm(f"{block}.{name}", width)
        tensors |= _linear(f"{block}.ff.net.0.proj", width, 8 * width)  # GEGLU: value and gate
        tensors |= _linear(f"{block}.ff.net.2", 4 * width, width)
    return tensors


def _linear(at: str, width: int, out: int) -> Shapes:
    return {f"{at}.weight": (out, width), f"{at}.bias": (out,)}


def _conv(at: str, width: int, out: int, kernel: int = 3) -> Shapes:
    return {f"{at}.weight": (out, width, kernel, kernel), f"{at}.bias": (out,)}


def _norm(at: str, width: int) -> Shapes:
    return {f"{at}.weight": (width,), f"{at}.bias": (width,)}


def _kind(kinds: Mapping[str, bool], name: str) -> bool:
    if name not in kinds:
        raise ConfigError(f"a block of kind {name} is not known here, expected {' or '.join(kinds)}")
    return kinds[name]


def _layers(config: Config) -> int:
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise ConfigError(f"layers_per_block: {layers} is not known here, expected one number")
    return layers


def _depths(config: Config) -> list[int]:
    """Transformer blocks in one attention, of each level."""
    depths: Any = config.get("transformer_layers_per_block", 1)
    count = len(config["block_out_channels"])
    found = [depths] * count if isinstance(depths, int) else list(depths)
    if len(found) != count or not all(isinstance(depth, int) for depth in found):
        raise ConfigError(
            f"transformer_layers_per_block: {depths} is not known here, expected {count} numbers"
        )
    return found


def widths_of_heads(config: Config) -> Iterator[int]:
    """How wide the attention heads of each level are.

    diffusers calls the *number* of heads `attention_head_dim` in these families (huggingface/diffusers#2011).
    """
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    channels = config["block_out_channels"]
    for level, width in enumerate(channels):
        yield width // (heads if isinstance(heads, int) else heads[level])
