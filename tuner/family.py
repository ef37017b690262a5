"""What a base-model family offers. It holds the frozen networks and is deliberately not an nn.Module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from tuner import quantised
from tuner.text import Text, Tokens


class Moments(NamedTuple):
    """The autoencoder's posterior of pictures, already scaled and shifted into the denoiser's space."""

    mean: Tensor  # [B, C, h, w]
    std: Tensor  # [B, C, h, w]

    def sample(self, noise: Tensor) -> Tensor:
        """A latent [B, C, h, w] of the posterior, from standard normal noise of that shape."""
        return self.mean + self.std * noise


class Cond(NamedTuple):
    """Everything a denoiser is told besides the noisy latent and the time."""

    text: Text
    time_ids: Tensor | None = None  # [B, 6]: original height and width, crop's top and left, target's
    concat: Tensor | None = None  # [B, k, h, w]


class Control(NamedTuple):
    """What a control branch adds to the denoiser."""

    down: tuple[Tensor, ...]
    middle: Tensor


@dataclass(frozen=True)
class Options:
    """How a base is held and how it reads captions.

    Attributes:
        vae: a folder or a file with another autoencoder than the base's own.
        clip_skip: which layer of the text encoders is read, 1 the last; None: as the family does.
        windows: how many windows of 75 tokens a caption has.
        quantise: how the frozen denoiser and text encoders are stored (bitsandbytes).
        compute: what quantised layers compute in.
        hold: the precision in which the denoiser and the text encoders are loaded.
        exact: those of them that are loaded in float32 all the same; `text_encoder` stands for all.
        prediction: what a checkpoint in one file was trained to predict; None: as the file tells or shows.
    """

    vae: Path | None = None
    clip_skip: int | None = None
    windows: int = 1
    quantise: Literal["nf4", "int8"] | None = None
    compute: torch.dtype = torch.float32
    hold: torch.dtype = torch.float32
    exact: tuple[str, ...] = ()
    prediction: Literal["epsilon", "v_prediction"] | None = None

    def dtype(self, component: str) -> torch.dtype:
        """What a component is loaded in; the autoencoder always in float32 (SDXL's overflows in float16)."""
        kind = "text_encoder" if component.startswith("text_encoder") else component
        lower = kind in ("unet", "text_encoder") and kind not in self.exact
        return self.hold if lower else torch.float32


class Family(ABC):
    """A base model: its frozen networks and how they are called.

    Attributes:
        name: the family's file name, for instance `sd1`.
        version: how the web UIs name the family in a ControlNet's file name, for instance `sd15`.
        PIPELINES: the part of the names of diffusers' pipelines that is the family's.
        told_sizes: the denoiser is told the picture's size and crop (`Batch.sizes`).
        inpainting: the denoiser is shown what is to be filled, and the rest of the picture.
        options: how it was loaded.
        factor: pixels a latent cell covers along one side (8).
        latent_channels: channels of the latent (4).
        scheduler_config: the base's own diffusion schedule, as its config says it.
        title: the base's name as exports tell it: no path.
        digests: a hash of each loaded component's files, by the component's name.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    PIPELINES: ClassVar[str]
    told_sizes: ClassVar[bool] = False
    inpainting: bool
    options: Options
    factor: int
    latent_channels: int
    scheduler_config: Mapping[str, Any]
    device: torch.device
    title: str
    digests: dict[str, str]
    _aside: tuple[str, ...] = ()

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """The loaded networks by their diffusers component names."""

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions -> Tokens: ids [B, W, 77], end positions [B, W], cut counts; for each text encoder."""

    @abstractmethod
    def add_tokens(self, names: Sequence[str]) -> dict[str, list[int]]:
        """Add words to every tokeniser; their ids, by text encoder, lie behind the frozen table.

        Raises:
            UserError: a name is a token already.
        """

    @abstractmethod
    def encode_images(self, pixels: Tensor) -> Moments:
        """[B, 3, H, W] in [-1, 1] -> Moments; without gradients, outside autocast, float32.

        An autoencoder in half precision that overflows is moved to float32.
        """

    @abstractmethod
    def decode_latents(self, latents: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [-1, 1]; without gradients, float32, as encode_images."""

    @abstractmethod
    def encode_prompts(self, tokens: Tokens, rows: Mapping[str, Tensor] | None = None) -> Text:
        """Tokens -> Text; differentiable in `rows` and in text adapters.

        Args:
            rows: the vectors [n, D] of added tokens, by text encoder.
        """

    @abstractmethod
    def condition(self, text: Text, sizes: Tensor | None = None, concat: Tensor | None = None) -> Cond:
        """What the denoiser is told.

        Args:
            text: encoded captions.
            sizes: [B, 6] as in Cond; None: the whole picture at the latent's size, as pipelines say it.
            concat: what `inpaint` gave; None: everything is to be filled.
        """

    @abstractmethod
    def inpaint(self, pixels: Tensor, hole: Tensor) -> Tensor:
        """What an inpainting denoiser is shown, [B, 1 + C, h, w]: the hole, and the rest of the picture.

        Args:
            pixels: [B, 3, H, W] in [-1, 1].
            hole: [B, 1, H, W], 1 where it is to be filled, else 0.
        """

    @abstractmethod
    def predict(
        self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, control: Control | None = None
    ) -> Tensor:
        """The denoiser's output [B, C, h, w] at x_t [B, C, h, w], t [B]."""

    @abstractmethod
    def control_branch(self, conditioning_channels: int) -> nn.Module:
        """A trainable clone of the denoiser's encoder and middle block with zero convolutions."""

    @abstractmethod
    def control(self, branch: nn.Module, x_t: Tensor, t: Tensor, cond: Cond, picture: Tensor) -> Control:
        """What a control branch adds; picture [B, k, H, W] in [0, 1]."""

    @abstractmethod
    def pipeline(self, control: nn.Module | None = None) -> Any:
        """A diffusers pipeline around the same networks, for sampling only."""

    @abstractmethod
    def inputs(self, text: Text, negative: Text, size: int, picture: Tensor | None = None) -> dict[str, Any]:
        """What the pipeline is called with to draw pictures of `size` pixels; an inpainting base draws all.

        Args:
            text, negative: prompts and negative prompts as `encode_prompts` gave them.
            picture: [B, k, H, W] in [0, 1], what a control branch looks at.
        """

    @abstractmethod
    def around(self, pipeline: Any) -> Self:
        """The same family with a diffusers pipeline's networks and tokenisers in place of its own."""

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The network that predicts."""

    @property
    @abstractmethod
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by component name."""

    @abstractmethod
    def embedding(self, encoder: str) -> nn.Embedding:
        """The input embedding [V, D] of a text encoder."""

    @abstractmethod
    def unread(self, encoder: str) -> tuple[str, ...]:
        """Paths in a text encoder of the modules whose output nothing reads: adapters there never learn."""

    def to(self, device: torch.device) -> None:
        """Move the networks."""
        assert not self._aside, "none are waiting elsewhere"
        self.device = device
        self._put(self.modules(), device)

    def _put(self, names: Iterable[str], device: torch.device) -> None:
        for name in names:
            quantised.move(self.modules()[name], device)

    @contextmanager
    def without(self, names: Iterable[str]) -> Iterator[None]:
        """Within it these networks wait in main memory, as nothing asks them; `complete` fetches them."""
        self._aside = tuple(names)
        self._put_aside()
        try:
            yield
        finally:
            self._put(self._aside, self.device)
            self._aside = ()

    @contextmanager
    def complete(self) -> Iterator[None]:
        """Within it all networks are on the device."""
        self._put(self._aside, self.device)
        try:
            yield
        finally:
            self._put_aside()

    def _put_aside(self) -> None:
        self._put(self._aside, torch.device("cpu"))
        if self._aside and self.device.type == "cuda":
            torch.cuda.empty_cache()  # else it would be kept for tensors of the same sizes

    def cast(self, dtype: torch.dtype, trained: Iterable[nn.Parameter]) -> None:
        """Hold what is frozen in a lower precision; the autoencoder and what is trained stay in float32."""
        kept = {id(parameter) for parameter in trained}
        for name, module in self.modules().items():
            for tensor in [*module.parameters(), *module.buffers()] if name != "vae" else []:
                if id(tensor) not in kept and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)

    def freeze(self) -> None:
        """No parameter of the base gets a gradient; dropout is off."""
        for module in self.modules().values():
            module.requires_grad_(False).eval()
