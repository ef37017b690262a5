"""What all Stable Diffusion models with a UNet share (arXiv 2112.10752).

A family's file says which text encoders it has, which of their layers is read, and what its denoiser is told.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner import attention, components
from tuner.errors import UserError
from tuner.family import Cond, Control, Family, Moments, Options
from tuner.progress import say
from tuner.text import Reading, Text, Tokens, extra_rows, layers, read, tokenize

DECODED = 1024 * 1024
"""Pixels that the autoencoder decodes together: in float32 its widest layers need 1 KiB a pixel, each."""


class StableDiffusion(Family):
    """The networks of one model.

    Class attributes:
        ENCODERS: the text encoders' component names.
        LAYER: the layer of the text encoders that is read, as clip skip counts it: 1 the last.
        CUT_LAYERS: how many last layers the family's folders leave out of the text encoder.
        NORM: the layer that is read goes through the encoder's final normalisation.
    """

    ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    LAYER: ClassVar[int] = 1
    CUT_LAYERS: ClassVar[int] = 0
    NORM: ClassVar[bool] = True
    PIPELINES: ClassVar[str] = "StableDiffusion"

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        scheduler_config: Mapping[str, Any],
        options: Options | None = None,
        folder: Path | None = None,
    ) -> None:
        """
        Args:
            networks: those that were loaded, by component name.
            tokenizers: by the name of their text encoder.
            folder: where the networks come from.

        Raises:
            UserError: the networks do not fit each other, or the options do not fit them.
        """
        self.networks: dict[str, Any] = dict(networks)
        self.tokenizers: dict[str, Any] = dict(tokenizers)
        self.scheduler_config = scheduler_config
        self.options = Options() if options is None else options
        self.folder = folder
        self.device = torch.device("cpu")
        self.factor = 8
        self.latent_channels = 4
        if vae := self.networks.get("vae"):
            self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
            self.latent_channels = int(vae.config.latent_channels)
        self.inpainting = False
        if unet := self.networks.get("unet"):  # the autoencoder keeps its own: cached latents stay valid
            self.inpainting = self._is_inpainting(unet)
            attention.choose(unet)
        self._check_text()
        self.freeze()

    @classmethod
    def load(
        cls,
        folder: Path,
        needs: Sequence[str],
        new: Sequence[str] = (),
        seed: int = 0,
        options: Options | None = None,
    ) -> Self:
        """Load the components a run needs from a diffusers folder, on the CPU, as the options hold them.

        Args:
            folder: the local folder.
            needs: component names; `text_encoder` stands for all that the family has.
            new: those of them that are initialised afresh, from their config.json and `seed`.

        Raises:
            UserError: a component is missing or does not load, or does not fit the others or the options.
        """
        from diffusers import DDPMScheduler
        from transformers import CLIPTokenizer

        options = Options() if options is None else options
        names = [n for need in needs for n in (cls.ENCODERS if need == "text_encoder" else (need,))]
        networks: dict[str, nn.Module] = {}
        for name in dict.fromkeys(names):
            place = options.vae if name == "vae" and options.vae is not None else folder / name
            if name in new:
                networks[name] = components.fresh(name, place, seed)
            elif options.quantise and (name == "unet" or name in cls.ENCODERS):
                networks[name] = components.load_quantised(name, place, options.quantise, options.compute)
            else:
                networks[name] = components.load(name, place, options.dtype(name))
        places = {name: folder / tokenizer_name(name) for name in cls.ENCODERS if name in networks}
        plain, words = components.without_weights, "vocab.json or tokenizer.json"
        tokenizers = {name: plain(CLIPTokenizer, place, words) for name, place in places.items()}
        scheduler = dict(plain(DDPMScheduler, folder / "scheduler", "scheduler_config.json").config)
        return cls(networks, tokenizers, scheduler, options, folder)

    def _is_inpainting(self, unet: Any) -> bool:
        """Whether the UNet is shown a hole and the picture around it besides the noisy latent."""
        found, latent = int(unet.config.in_channels), self.latent_channels
        if found not in (latent, 2 * latent + 1):
            raise UserError(
                f"unet/config.json: in_channels {found}; expected {latent}, "
                f"or {2 * latent + 1} of an inpainting base; is base.vae that of another family?"
            )
        return found != latent

    def _check_text(self) -> None:
        """Raises UserError where the text encoders lack a layer or a word's row, or have a wrong width."""
        for name, tokenizer in self.tokenizers.items():
            rows = self.embedding(name).num_embeddings
            if len(tokenizer) > rows:
                place = "" if self.folder is None else f"{self.folder / tokenizer_name(name)}: "
                raise UserError(
                    f"{place}the tokeniser has {len(tokenizer)} tokens, but the {name} has {rows} rows "
                    "for them; expected the files of one base"
                )
        for name, encoder in self.text_encoders.items():
            have = layers(encoder)[1] + self.CUT_LAYERS
            if not self.CUT_LAYERS < self._layer <= have:
                raise UserError(
                    f"base.clip_skip: found {self._layer}, expected {self.CUT_LAYERS + 1} to {have}: "
                    f"the {name} of this base has no other layers"
                )
        if "unet" in self.networks and self.text_encoders:
            found = sum(int(encoder.config.hidden_size) for encoder in self.text_encoders.values())
            wanted = int(self.networks["unet"].config.cross_attention_dim)
            if found != wanted:
                raise UserError(
                    f"unet/config.json: cross_attention_dim {wanted} is not the text encoders' width {found}"
                )

    @property
    def _layer(self) -> int:
        """The layer of the text encoders that is read, as clip skip counts it."""
        return self.LAYER if self.options.clip_skip is None else self.options.clip_skip

    def modules(self) -> dict[str, nn.Module]:
        return self.networks

    @property
    def denoiser(self) -> nn.Module:
        unet: nn.Module = self.networks["unet"]
        return unet

    @property
    def text_encoders(self) -> dict[str, Any]:
        return {name: self.networks[name] for name in self.ENCODERS if name in self.networks}

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's; None where none is loaded."""
        return next(iter(self.tokenizers.values()), None)

    def embedding(self, encoder: str) -> nn.Embedding:
        embedding = self.networks[encoder].get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def unread(self, encoder: str) -> tuple[str, ...]:
        if self._pools(encoder):
            return ()
        place, count = layers(self.networks[encoder])
        return tuple(f"{place}.{n}" for n in range(count - (self._layer - self.CUT_LAYERS - 1), count))

    def _pools(self, encoder: str) -> bool:
        """Whether the pooled output of a text encoder is used too."""
        return False

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        windows = self.options.windows
        made = [tokenize(tokenizer, captions, windows) for tokenizer in self.tokenizers.values()]
        return made[0]._replace(second=made[1]) if len(made) == 2 else made[0]

    def add_tokens(self, names: Sequence[str]) -> dict[str, list[int]]:
        for tokenizer in self.tokenizers.values():
            vocabulary = tokenizer.get_vocab()
            for name in names:
                if name in vocabulary or f"{name.lower()}</w>" in vocabulary:
                    # It would be read as the new word wherever it stands, within other words too.
                    raise UserError(
                        f"method.textual_inversion.token: the token {name} is in the base's vocabulary "
                        f"already; choose another, such as <{name.strip('<>').removesuffix('</w')}>"
                    )
        ids: dict[str, list[int]] = {}
        for encoder, tokenizer in self.tokenizers.items():
            tokenizer.add_tokens(list(names))
            ids[encoder] = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]
        return ids

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Moments:
        with torch.autocast(pixels.device.type, enabled=False):
            found = self._moments(pixels)
            if self._vae_overflowed(found):
                found = self._moments(pixels)
            return found

    def _moments(self, pixels: Tensor) -> Moments:
        vae = self.networks["vae"]
        posterior = vae.encode(pixels.to(_dtype(vae))).latent_dist
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scale = vae.config.scaling_factor
        return Moments((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)

    def _vae_overflowed(self, made: Sequence[Tensor]) -> bool:
        """Whether an autoencoder that was handed over in half precision made numbers that are not finite.

        It is moved to float32 for good then: SDXL's own overflows in float16. What this project loads is held
        in float32 from the start, and is not waited for.
        """
        vae = self.networks["vae"]
        if _dtype(vae) == torch.float32 or all(bool(one.isfinite().all()) for one in made):
            return False
        say(f"the autoencoder overflows in {str(_dtype(vae)).removeprefix('torch.')}; it goes on in float32")
        vae.float()
        return True

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """As many at a time as have DECODED pixels together, at least one."""
        vae = self.networks["vae"]
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        with torch.autocast(latents.device.type, enabled=False):
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            scaled = latents.float() / vae.config.scaling_factor + shift

            def decode() -> list[Tensor]:
                parts = scaled.to(_dtype(vae)).split(max(1, DECODED // pixels))
                return [vae.decode(part).sample.float() for part in parts]

            made = decode()
            return torch.cat(decode() if self._vae_overflowed(made) else made)

    def inpaint(self, pixels: Tensor, hole: Tensor) -> Tensor:
        """As diffusers' inpainting pipelines make it, but with the posterior's mean instead of a draw."""
        around = self.encode_images(pixels * (hole < 0.5)).mean
        small = F.interpolate(hole, size=around.shape[-2:])  # the nearest: it stays 0 or 1
        return torch.cat([small.to(around.dtype), around], dim=1)

    def _read(self, encoder: str, tokens: Tokens, rows: Mapping[str, Tensor] | None) -> Reading:
        """What a text encoder makes of its tokens."""
        own = None if rows is None else rows.get(encoder)
        with extra_rows(self.embedding(encoder), own):
            return read(self.networks[encoder], tokens.ids, self._layer - self.CUT_LAYERS, self.NORM)

    def encode_prompts(self, tokens: Tokens, rows: Mapping[str, Tensor] | None = None) -> Text:
        return Text(self._read("text_encoder", tokens, rows).hidden)

    def condition(self, text: Text, sizes: Tensor | None = None, concat: Tensor | None = None) -> Cond:
        return Cond(text, sizes, concat)

    def _input(self, x_t: Tensor, cond: Cond) -> Tensor:
        """What goes into the UNet: [B, C, h, w], or [B, 2 C + 1, h, w] of an inpainting base."""
        if not self.inpainting:
            return x_t
        concat = cond.concat
        if concat is None:
            height, width = (side * self.factor for side in x_t.shape[-2:])
            hole = torch.ones(1, 1, height, width, device=x_t.device)
            concat = self.inpaint(hole.new_zeros(1, 3, height, width), hole).expand(len(x_t), -1, -1, -1)
        return torch.cat([x_t, concat.to(x_t.dtype)], dim=1)

    def _told(self, x_t: Tensor, cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
        """What UNet and control branch are told besides text and time, as their arguments."""
        return {}

    def predict(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, control: Control | None = None
    ) -> Tensor:
        dtype = _dtype(denoiser)
        down = None if control is None else [d.to(dtype) for d in control.down]
        middle = None if control is None else control.middle.to(dtype)
        output: Tensor = denoiser(
            self._input(x_t, cond).to(dtype),
            t,
            encoder_hidden_states=cond.text.hidden.to(dtype),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
            **self._told(x_t, cond, dtype),
        )[0]
        return output

    def control_branch(self, conditioning_channels: int) -> nn.Module:
        """As diffusers' from_unet makes it; an inpainting base's branch sees the noisy latent alone.

        So its pipelines call it: its first convolution has the UNet's weights for the latent's channels.
        """
        from diffusers import ControlNetModel

        branch: Any = ControlNetModel.from_unet(
            self.denoiser, conditioning_channels=conditioning_channels, load_weights_from_unet=False
        )
        shared = [name for name in branch.state_dict() if not name.startswith("controlnet_")]
        branch.load_state_dict(self._weights(shared), strict=False)
        if self.inpainting:
            whole, latent = branch.conv_in, self.latent_channels
            branch.conv_in = nn.Conv2d(latent, whole.out_channels, whole.kernel_size, padding=whole.padding)
            with torch.no_grad():
                branch.conv_in.weight.copy_(whole.weight[:, :latent])
                branch.conv_in.bias.copy_(whole.bias)
            branch.register_to_config(in_channels=latent)
        strides = len(branch.config.conditioning_embedding_out_channels) - 1
        assert 2**strides == self.factor, "the condition encoder's stride is the autoencoder's factor"
        attention.choose(branch)
        clone: nn.Module = branch
        return clone

    def _weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Tensors of the denoiser in float32; where it is held in less, as its file has them."""
        held = self.denoiser.state_dict()
        if self.options.quantise is None and all(held[name].dtype == torch.float32 for name in names):
            return {name: held[name] for name in names}
        assert self.folder is not None
        return components.tensors(self.folder / "unet", names)

    def control(self, branch: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, picture: Tensor) -> Control:
        dtype = _dtype(branch)
        down, middle = branch(
            x_t.to(dtype),
            t,
            encoder_hidden_states=cond.text.hidden.to(dtype),
            controlnet_cond=picture.to(dtype),
            return_dict=False,
            **self._told(x_t, cond, dtype),
        )
        return Control(tuple(down), middle)

    def pipeline(self, control: nn.Module | None = None) -> Any:
        import diffusers

        parts = {name: self.networks[name] for name in ("vae", *self.ENCODERS, "unet")}
        parts |= {tokenizer_name(name): part for name, part in self.tokenizers.items()}
        parts["scheduler"] = diffusers.DDIMScheduler.from_config(dict(self.scheduler_config))
        if control is not None:
            parts["controlnet"] = control
        kind = f"{'ControlNet' if control is not None else ''}{'Inpaint' if self.inpainting else ''}Pipeline"
        pipe: Any = getattr(diffusers, self.PIPELINES + kind)(**parts, **self._pipeline_settings())
        if self.inpainting:  # the autoencoder stays in float32, and what is shown is as in training
            pipe._encode_vae_image = lambda image, generator: self.encode_images(image).mean
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _pipeline_settings(self) -> dict[str, Any]:
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def inputs(self, text: Text, negative: Text, size: int, picture: Tensor | None = None) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "prompt_embeds": text.hidden,
            "negative_prompt_embeds": negative.hidden,
            "height": size,
            "width": size,
        }
        if picture is not None:
            inputs |= {"control_image" if self.inpainting else "image": picture}
            inputs["controlnet_conditioning_scale"] = 1.0  # the inpainting pipelines' default is 0.5
        if self.inpainting:
            grey = torch.full((len(text.hidden), 3, size, size), 0.5, device=text.hidden.device)
            inputs |= {"image": grey, "mask_image": torch.ones_like(grey[:, :1]), "strength": 1.0}
        return inputs

    def around(self, pipeline: Any) -> Self:
        other = copy.copy(self)
        parts = pipeline.components
        other.networks = {name: parts.get(name, network) for name, network in self.networks.items()}
        other.tokenizers = {
            name: parts.get(tokenizer_name(name), tokenizer) for name, tokenizer in self.tokenizers.items()
        }
        return other


def tokenizer_name(encoder: str) -> str:
    """The component name of a text encoder's tokeniser: `tokenizer_2` of `text_encoder_2`."""
    return encoder.replace("text_encoder", "tokenizer")


def _dtype(network: nn.Module) -> torch.dtype:
    """What a network's inputs are given in: of its first parameter that is no quantised one."""
    return next(p.dtype for p in network.parameters() if p.is_floating_point())
