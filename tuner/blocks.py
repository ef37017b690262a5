"""The blocks of a recipe that are the same for every method, but for training.py's; recipe.py joins them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuner.block import Block, Conflict, OneOrMore
from tuner.data.caption_block import Captions

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Interval = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Base(Block):
    """The model that is adapted."""

    short: ClassVar[str | None] = "path"

    path: Text = Field(
        description="'embedded' (ships), a diffusers folder, a .safetensors checkpoint, or a Hub id"
    )
    revision: str | None = Field(None, description="branch, tag or commit, where the base comes from a hub")
    new: list[Literal["unet", "vae", "text_encoder", "text_encoder_2", "image_encoder"]] = Field(
        [], description="components initialised afresh from their config.json instead of loaded"
    )
    vae: Text | None = Field(
        None, description="folder or .safetensors file of another autoencoder; null: the base's own"
    )
    clip_skip: Positive | None = Field(
        None, description="layer of the text encoder that is read, 1 the last; null: the family's own"
    )
    windows: Positive = Field(1, description="windows of 75 tokens that a caption may fill")
    prediction: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="what a checkpoint in one file was trained to predict; null: as the file shows"
    )
    quantise: Literal["nf4", "int8"] | None = Field(
        None, description="how the frozen UNet and text encoders are stored; null: as train.precision says"
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Networks that would be made in two ways at once."""
        if self.vae is not None and "vae" in self.new:
            yield Conflict(("vae", "new"), "found together with vae in new, expected one of the two")
        if self.quantise is not None and (both := [name for name in self.new if name not in ONLY_FLOATING]):
            yield Conflict(("quantise", "new"), f"found with {', '.join(both)} in new, which are not frozen")


ONLY_FLOATING = ("vae", "image_encoder")


class Source(Block):
    """A set of pictures."""

    short: ClassVar[str | None] = "path"

    path: Text = Field(
        description="a folder with metadata.jsonl, with .txt beside the pictures, or in datasets/"
    )
    repeats: Positive = Field(1, description="how often each of its pictures comes in one epoch")


Sources = Annotated[list[Source], OneOrMore()]


class Data(Block):
    """What is trained on."""

    source: Sources = Field(description="the pictures trained on", min_length=1)
    heldout: Sources = Field([], description="pictures for validation and evaluation, never trained on")
    resolution: Positive = Field(description="width and height that pictures are trained at, in pixels")
    crop: Literal["center", "random"] = Field(
        "center", description="which square of a picture that is not square"
    )
    flip: bool = Field(False, description="mirror half of the pictures, left to right")
    captions: Captions = Field(Captions(), description="how captions are chosen and changed")
    cache: Text | None = Field(
        None, description="folder of encoded pictures and texts; null: the user's; 'off': none"
    )
    workers: Interval | None = Field(
        None, description="processes that load pictures; null: chosen; 0: the main one"
    )


class Preview(Block):
    """Pictures made while training, at fixed seeds."""

    every: Interval = Field(0, description="optimiser steps between two; 0: none")
    prompts: list[str] = Field([], description="what they show; empty: captions of held-out samples")
    count: Positive = Field(4, description="pictures each time")
    negative: str = Field("", description="negative prompt")
    steps: Positive = Field(20, description="sampling steps")
    guidance: float = Field(5.0, ge=0, description="scale of classifier-free guidance; 1 is none")
    seed: Interval = Field(0, description="seed of the sampled noise")


class Validation(Block):
    """The loss on held-out samples, on a fixed grid of noise and timesteps."""

    every: Interval = Field(0, description="optimiser steps between two; 0: none")
    samples: Positive = Field(64, description="held-out samples looked at, or all where there are fewer")


class Evaluate(Block):
    """What is measured on generated pictures at the end."""

    samples: Interval = Field(0, description="held-out samples measured; 0: no evaluation")
    steps: Positive = Field(20, description="sampling steps")
    guidance: float = Field(5.0, ge=0, description="scale of classifier-free guidance; 1 is none")
    seed: Interval = Field(0, description="seed of the sampled noise")


class Export(Block):
    """The files that inference tools load."""

    every: Interval = Field(0, description="optimiser steps between two exports; 0: at the end only")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")] | None = Field(
        None, description="stem of the files: letters, digits, _ - and .; null: the recipe's file stem"
    )
    dtype: Literal["fp16", "fp32", "bf16"] = Field("fp16", description="precision of the exported weights")
    licence: Text | None = Field(
        None, description="what the files say of their licence, best as the Hub calls it: apache-2.0 ..."
    )
    trigger: Text | None = Field(
        None, description="words for prompts that the files tell; null: new words, where they are trained"
    )
    tag_frequency: bool = Field(
        False, description="tell in a LoRA's file how often each tag is in the captions"
    )


class Logging(Block):
    """Where figures go beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard files")
    wandb: Text | None = Field(None, description="Weights & Biases project; null: none")
