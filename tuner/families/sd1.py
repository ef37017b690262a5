"""Stable Diffusion 1.x: KL autoencoder, CLIP text encoder, UNet with cross-attention (arXiv 2112.10752)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tuner import attention
from tuner.errors import UserError
from tuner.family import Cond, Control, Family, Moments
from tuner.text import Text, Tokens, extra_rows, tokenize

COMPONENTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}


class StableDiffusion1(Family):
    """The networks of one Stable Diffusion 1.x model."""

    name: ClassVar[str] = "sd1"
    version: ClassVar[str] = "sd15"

    def __init__(
        self, networks: dict[str, nn.Module], tokenizer: Any, scheduler_config: Mapping[str, Any]
    ) -> None:
        self.networks: dict[str, Any] = dict(networks)
        self.tokenizer = tokenizer
        self.scheduler_config = scheduler_config
        self.device = torch.device("cpu")
        self.factor = 8
        self.latent_channels = 4
        if vae := self.networks.get("vae"):
            self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
            self.latent_channels = int(vae.config.latent_channels)
        if unet := self.networks.get("unet"):  # the autoencoder keeps its own: cached latents stay valid
            attention.choose(unet)
        self.freeze()

    @classmethod
    def load(
        cls, folder: Path, needs: Sequence[str], new: Sequence[str] = (), seed: int = 0
    ) -> StableDiffusion1:
        """Load the components a run needs from a diffusers folder, in float32 on the CPU.

        Args:
            folder: the local folder.
            needs: component names.
            new: those of them that are initialised afresh, from their config.json and `seed`.

        Raises:
            UserError: a component is missing or does not load.
        """
        from diffusers import DDPMScheduler
        from transformers import CLIPTokenizer

        networks = {name: _component(name, folder, name in new, seed) for name in needs}
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer") if "text_encoder" in needs else None
        scheduler = dict(DDPMScheduler.from_pretrained(folder / "scheduler").config)
        return cls(networks, tokenizer, scheduler)

    def modules(self) -> dict[str, nn.Module]:
        return self.networks

    @property
    def denoiser(self) -> nn.Module:
        unet: nn.Module = self.networks["unet"]
        return unet

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.networks["text_encoder"]} if "text_encoder" in self.networks else {}

    def embedding(self, encoder: str) -> nn.Embedding:
        embedding = self.networks[encoder].get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        return tokenize(self.tokenizer, captions)

    def add_tokens(self, names: Sequence[str]) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        for name in names:
            if name in vocabulary:
                raise UserError(f"the token {name} is in the base's vocabulary already; choose another")
        self.tokenizer.add_tokens(list(names))
        return [int(self.tokenizer.convert_tokens_to_ids(name)) for name in names]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Moments:
        vae = self.networks["vae"]
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = vae.encode(pixels.float()).latent_dist
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            scale = vae.config.scaling_factor
            return Moments((posterior.mean - shift) * scale, posterior.std * scale)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        vae = self.networks["vae"]
        with torch.autocast(latents.device.type, enabled=False):
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            decoded: Tensor = vae.decode(latents.float() / vae.config.scaling_factor + shift).sample
            return decoded

    def encode_prompts(self, tokens: Tokens, rows: Tensor | None = None) -> Text:
        encoder = self.networks["text_encoder"]
        with extra_rows(self.embedding("text_encoder"), rows):
            hidden = encoder(tokens.ids[:, 0]).last_hidden_state
        return Text(hidden)

    def condition(self, text: Text) -> Cond:
        return Cond(text)

    def predict(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, control: Control | None = None
    ) -> Tensor:
        dtype = next(denoiser.parameters()).dtype
        down = None if control is None else [d.to(dtype) for d in control.down]
        middle = None if control is None else control.middle.to(dtype)
        output: Tensor = denoiser(
            x_t.to(dtype),
            t,
            encoder_hidden_states=cond.text.hidden.to(dtype),
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return output

    def control_branch(self, conditioning_channels: int) -> nn.Module:
        from diffusers import ControlNetModel

        branch: Any = ControlNetModel.from_unet(self.denoiser, conditioning_channels=conditioning_channels)
        strides = len(branch.config.conditioning_embedding_out_channels) - 1
        assert 2**strides == self.factor, "the condition encoder's stride is the autoencoder's factor"
        attention.choose(branch)
        clone: nn.Module = branch
        return clone

    def control(self, branch: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, picture: Tensor) -> Control:
        dtype = next(branch.parameters()).dtype
        down, middle = branch(
            x_t.to(dtype),
            t,
            encoder_hidden_states=cond.text.hidden.to(dtype),
            controlnet_cond=picture.to(dtype),
            return_dict=False,
        )
        return Control(tuple(down), middle)

    def pipeline(self, control: nn.Module | None = None) -> Any:
        from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline

        parts: dict[str, Any] = {
            "vae": self.networks["vae"],
            "text_encoder": self.networks["text_encoder"],
            "tokenizer": self.tokenizer,
            "unet": self.networks["unet"],
            "scheduler": DDIMScheduler.from_config(dict(self.scheduler_config)),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        if control is None:
            pipe = StableDiffusionPipeline(**parts)
        else:
            pipe = StableDiffusionControlNetPipeline(controlnet=control, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def _component(name: str, folder: Path, new: bool, seed: int) -> nn.Module:
    """One network from its folder, loaded or initialised afresh."""
    import diffusers
    import transformers

    library, class_name = COMPONENTS[name]
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    place = folder / name
    if not (place / "config.json").is_file():
        raise UserError(f"base {folder}: the component {name} is missing (no {name}/config.json)")
    if new:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            config = (
                kind.load_config(place)
                if library == "diffusers"
                else kind.config_class.from_pretrained(place)
            )
            fresh: nn.Module = kind.from_config(config) if library == "diffusers" else kind(config)
        return fresh.float()
    try:
        loaded: nn.Module = kind.from_pretrained(
            place, torch_dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"base {folder}: the component {name} does not load: {error}") from error
    return loaded


def fits(folder: Path) -> bool:
    """Whether a diffusers folder holds this family: one text encoder, a UNet that is not told sizes."""
    config = folder / "unet" / "config.json"
    if not config.is_file() or (folder / "text_encoder_2").exists():
        return False
    unet = json.loads(config.read_text(encoding="utf-8"))
    return unet.get("_class_name") == "UNet2DConditionModel" and unet.get("addition_embed_type") is None


FAMILY = StableDiffusion1
