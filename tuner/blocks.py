"""The blocks of a recipe that are the same for every method, but for training.py's; recipe.py joins them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuner.block import Block, Conflict, OneOrMore
from tuner.data.caption_block import Captions
from tuner.data.conditions import Condition
from tuner.data.jitter import Jitter
from tuner.data.pictures import LIMIT
from tuner.data.sources.spec import SourceSpec
from tuner.data.views import Masks

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


Sides = Positive | Annotated[list[Positive], Field(min_length=1)]
Byte = Annotated[int, Field(ge=0, le=255)]


class Source(SourceSpec):
    """A set of pictures, with rules of its own where it has them."""

    share: float | None = Field(
        None, gt=0, description="how much of an epoch its pictures are, beside other sources' shares"
    )
    resolution: Sides | None = Field(None, description="of its pictures; null: data.resolution")
    captions: Captions | None = Field(None, description="its rules of captions; null: data.captions")
    condition: Condition | None = Field(None, description="its conditions; null: the method's")


Sources = Annotated[list[Source], OneOrMore()]


class Buckets(Block):
    """Pictures are trained at shapes near their own instead of squares, of no larger area."""

    step: Positive | None = Field(
        None, description="widths and heights are multiples of it, in pixels; null: 64, or what divides"
    )
    longest: float = Field(2.0, ge=1, description="the longer side by the shorter, at most")
    upscale: bool = Field(True, description="enlarge pictures that are smaller than their bucket")
    last: Literal["smaller", "padded"] = Field(
        "smaller", description="a bucket's last batch: smaller, or filled with pictures that do not count"
    )


class Stage(Block):
    """A part of the training with a resolution of its own."""

    resolution: Sides = Field(description="as data.resolution, in this stage")
    steps: Positive | None = Field(
        None, description="optimiser steps; in the last stage null: what is left of train.steps"
    )
    batch_size: Positive | None = Field(None, description="pictures in a step; null: train.batch_size")


class Data(Block):
    """What is trained on."""

    source: Sources = Field(description="the pictures trained on", min_length=1)
    heldout: Sources = Field([], description="pictures for validation and evaluation, never trained on")
    resolution: Sides | None = Field(
        None,
        description="width and height of the squares that pictures are trained at, in pixels; of several "
        "areas each picture comes at each; this or stages",
    )
    stages: Annotated[list[Stage], Field(min_length=2)] | None = Field(
        None, description="resolutions one after another, such as 256 and then 512; this or resolution"
    )
    buckets: Buckets | None = Field(None, description="shapes near each picture's own; null: squares")
    crop: Literal["center", "random"] = Field(
        "center", description="which square of a picture that is not square"
    )
    flip: bool = Field(False, description="mirror half of the pictures, left to right")
    jitter: Jitter | None = Field(None, description="colours changed at random; null: not")
    background: Annotated[tuple[Byte, Byte, Byte], Field(strict=False)] = Field(
        (255, 255, 255), description="red, green, blue behind transparent parts"
    )
    alpha: Literal["composite", "mask"] = Field(
        "composite", description="transparency: lies on the background, or is the picture's mask"
    )
    masks: Masks | None = Field(None, description="how masks weigh the loss, where samples have them")
    max_pixels: Positive = Field(LIMIT, description="larger pictures are refused before they are decoded")
    unreadable: Interval = Field(0, description="samples that may be left out because they cannot be used")
    captions: Captions = Field(Captions(), description="how captions are chosen and changed")
    cache: Text | None = Field(
        None, description="folder of encoded pictures and texts; null: the user's; 'off': none"
    )
    workers: Interval | None = Field(
        None, description="processes that load pictures; null: chosen; 0: the main one"
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Shares of some sources only; the same resolution twice; a background that nothing lies on; rules of
        held-out sources, which are looked at as `data` says."""
        given = [source.share is not None for source in self.source]
        if any(given) and not all(given):
            without = given.index(False)
            yield Conflict(
                (f"source.{without}.share",), "found none, but other sources have shares; give all one"
            )
        yield from self._size_conflicts()
        for number, source in enumerate(self.heldout):
            for key in ("repeats", "weight", "share", "resolution", "captions", "condition", "buffer"):
                if getattr(source, key) != Source.model_fields[key].default:
                    yield Conflict((f"heldout.{number}.{key}",), "has no effect on held-out pictures")
        if self.alpha == "mask" and "background" in self.model_fields_set:
            yield Conflict(("background", "alpha"), "has no effect where alpha is the mask")

    def _size_conflicts(self) -> Iterator[Conflict]:
        """Not exactly one of resolution and stages; the same size twice; a stage without an end."""
        if self.resolution is None and self.stages is None:
            yield Conflict(("resolution", "stages"), "is missing; expected a whole number, or stages")
        if self.resolution is not None and self.stages is not None:
            message = "found together with stages, expected one of the two"
            yield Conflict(("resolution", "stages"), message)
        for key, wide in self._sizes():
            if len(set(wide)) < len(wide):
                yield Conflict((key,), f"found {list(wide)}, expected different numbers")
        for number, stage in enumerate((self.stages or [])[:-1]):
            if stage.steps is None:
                yield Conflict((f"stages.{number}.steps",), "is missing; only the last stage may lack it")

    def _sizes(self) -> list[tuple[str, tuple[int, ...]]]:
        given = [("resolution", self.resolution)] if self.resolution is not None else []
        given += [(f"stages.{n}.resolution", stage.resolution) for n, stage in enumerate(self.stages or [])]
        return [(key, (one,) if isinstance(one, int) else tuple(one)) for key, one in given]

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """The sides of the squares whose areas are trained at, stage after stage."""
        return [wide for _, wide in self._sizes()]

    @property
    def side(self) -> int:
        """Of the largest square of the last stage, in pixels: what previews and measures are drawn at."""
        return max(self.sizes[-1])


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
