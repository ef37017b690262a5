"""What a method offers: which tensors are trained, what the step computes, what is written at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner.batch import Batch
from tuner.block import Block
from tuner.export.metadata import Kind, with_hash
from tuner.family import Cond, Family
from tuner.text import Text, Tokens


@dataclass(frozen=True)
class Card:
    """What an export says about itself."""

    name: str  # the export's file stem
    dtype: torch.dtype
    metadata: Mapping[Kind, Mapping[str, str]] = field(default_factory=dict)  # by the method's kind

    def cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors in the export's precision, on the CPU; single numbers and whole ones keep theirs."""
        return {
            name: tensor.detach().to("cpu", stored_type(name, tensor, self.dtype))
            for name, tensor in tensors.items()
        }

    def header(self, kind: Kind, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The metadata of a file of these tensors."""
        return with_hash(self.metadata[kind], tensors) if kind in self.metadata else {}


def stored_type(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type that an export in `dtype` holds a tensor in.

    An alpha, as any single number, is float32: every tool reads it as one, and bfloat16 makes 5.3125 of 5.3.
    """
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if tensor.ndim == 0 or name.endswith(".alpha") else dtype


class Prior(Block):
    """Class pictures, which are half of every batch; see tuner/prior.py."""

    prompt: str = Field(description="what they show, and their caption: a photo of a dog", min_length=1)
    source: str | None = Field(
        None, min_length=1, description="a folder of them; null: the base draws them before the training"
    )
    weight: float = Field(1.0, gt=0, description="weight of their loss beside that of the other pictures")
    count: int = Field(200, ge=1, description="how many the base draws")
    steps: int = Field(30, ge=1, description="sampling steps of each")
    guidance: float = Field(5.0, ge=0, description="scale of classifier-free guidance; 1 is none")

    def unused(self) -> dict[str, str]:
        keys = ("count", "steps", "guidance") if self.source is not None else ()
        return dict.fromkeys(keys, "the pictures of source are taken")


class Method(nn.Module):
    """A way to adapt a base. Its parameters with requires_grad are exactly what is trained.

    Class attributes:
        kind: what its exports are, in metadata's terms.
        NEEDS: the base's components that the method loads.
        TRAINS: those of them whose own weights it trains.
        COMBINES: other methods that may stand beside it in a recipe.
        DROP_CAPTIONS: the default share of captions replaced by the empty one.
        WHOLE_STEP: the method replaces the diffusion step by its own `loss`.
        CACHES_LATENTS, CACHES_TEXT: the frozen encoders' outputs do not change while it trains.
        SETTLES: `after_update` moves what was trained.
    """

    kind: ClassVar[Kind]
    NEEDS: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder")
    TRAINS: ClassVar[tuple[str, ...]] = ()
    COMBINES: ClassVar[tuple[str, ...]] = ()
    DROP_CAPTIONS: ClassVar[float] = 0.0
    WHOLE_STEP: ClassVar[bool] = False
    CACHES_LATENTS: ClassVar[bool] = True
    CACHES_TEXT: bool = True  # of an instance, as a configuration may decide it
    SETTLES: bool = False  # so is this

    def __init__(self, config: Any, family: Family, seed: int) -> None:
        """Build what is trained, from `seed` alone.

        Raises:
            UserError: the configuration does not fit the base.
        """
        super().__init__()
        self.config = config

    @classmethod
    def exact(cls, config: Any) -> tuple[str, ...]:
        """The base's components that have to be loaded in float32: those it trains, or makes a start of."""
        return cls.TRAINS

    def encode(self, family: Family, tokens: Tokens) -> Text:
        """Captions as the base adapted by this method alone reads them; Task.encode has all methods."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.CACHES_TEXT):
            return family.encode_prompts(tokens, self.new_rows() or None)

    def new_rows(self) -> Mapping[str, Tensor]:
        """The vectors [n, D] of words that the method added to the tokenisers, by text encoder."""
        return {}

    @property
    def condition(self) -> Block | None:
        """How the condition pictures that the method looks at are made (a Condition); None for none."""
        return None

    @property
    def prior(self) -> Prior | None:
        """Class pictures that are trained on beside the data."""
        return None

    def labels(self) -> dict[str, Any]:
        """What the metadata tells besides: trigger phrase, rank, alpha."""
        return {}

    def check_captions(self, captions: set[str]) -> list[str]:
        """Those of the captions that the method cannot learn from."""
        return []

    def predict(self, family: Family, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """The adapted base's prediction [B, C, h, w]."""
        return family.predict(family.denoiser, x_t, t, cond)

    def loss(self, family: Family, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole step of a method with WHOLE_STEP: a loss for each sample [B], and figures to log."""
        raise AssertionError("only methods with WHOLE_STEP are asked for a loss")

    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The optimiser's parameter groups; a group without `lr` gets the recipe's learning rate."""
        return [{"params": list(self.trained().values())}]

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors, nothing else; what a checkpoint holds."""
        return {name: p.detach() for name, p in self.trained().items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors() of an earlier run back, bitwise."""
        own = self.trained()
        assert own.keys() == tensors.keys(), sorted(own.keys() ^ tensors.keys())[:5]
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def train_mode(self, on: bool) -> None:
        """Dropout and the like, on for training, off for looking."""
        self.train(on)

    def before_update(self, step: int) -> None:
        """Change the gradients of optimiser step `step`, counted from 0, before they are clipped and used."""

    def after_update(self) -> None:
        """Put what was trained where it has to stay; the last part of each optimiser step.

        Called, too, on averages of weights (`train.ema`) before they are looked at or kept.
        """

    def figures(self) -> dict[str, Tensor]:
        """Scalars to log after an optimiser step; left on the device."""
        return {}

    def depends(self) -> dict[str, Path]:
        """Files besides the base and the data that the method starts from, by the recipe's key."""
        return {}

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """Within it the base works as if the method were not there."""
        yield

    def control_branch(self) -> nn.Module | None:
        """The branch that sampling needs beside the base, if the method has one."""
        return None

    def look(self, picture: Tensor) -> Tensor:
        """A condition picture [B, 3, H, W] in [0, 1] as that branch sees it, [B, k, H, W]."""
        return picture

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """Write what was trained in every tool's format; each file appears whole. Returns the files."""
        raise AssertionError("every method exports")

    def retold(self, path: Path, card: Card) -> Mapping[str, str | None]:
        """What the metadata of an exported file says otherwise than the card; None: what it leaves out."""
        return {}

    def replacements(self) -> tuple[tuple[str, str], ...]:
        """Words in captions and prompts that the method puts others in place of, in this order."""
        return ()

    def templates(self) -> tuple[str, ...]:
        """Sentences with one {} each, where a sample's caption is put in; none: the caption as it is."""
        return ()


def public_config(module: Any) -> dict[str, Any]:
    """A network's configuration as its library writes it into config.json."""
    config: Any = module.config
    if hasattr(config, "to_dict"):  # transformers
        return {"architectures": [type(module).__name__], **config.to_dict(), "dtype": "float32"}
    text: str = module.to_json_string()
    return dict(json.loads(text))
