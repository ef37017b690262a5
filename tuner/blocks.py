"""The blocks of a recipe that are the same for every method; recipe.py puts them together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tuner.block import Block, Conflict, OneOrMore

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
Interval = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Betas = Annotated[tuple[float, float], Field(strict=False)]  # not strict: YAML has lists only
Range = Annotated[tuple[int, int], Field(strict=False)]


class Base(Block):
    """The model that is adapted."""

    short: ClassVar[str | None] = "path"

    path: Text = Field(
        description="'embedded' (the small model that ships) or a local folder in diffusers layout"
    )
    revision: str | None = Field(None, description="branch, tag or commit, where the base comes from a hub")
    new: list[Literal["unet", "vae", "text_encoder", "image_encoder"]] = Field(
        [], description="components initialised afresh from their config.json instead of loaded"
    )


class Source(Block):
    """A set of pictures."""

    short: ClassVar[str | None] = "path"

    path: Text = Field(
        description="a folder with metadata.jsonl, with .txt beside the pictures, or in datasets/"
    )
    repeats: Positive = Field(1, description="how often each of its pictures comes in one epoch")


Sources = Annotated[list[Source], OneOrMore()]


class Captions(Block):
    """How the captions of a picture become the one it is trained with."""

    drop: Share | None = Field(
        None, description="share of captions made empty, 0 to 1; null: the method's own"
    )
    prefix: str = Field("", description="text put before every caption")
    templates: list[str] = Field([], description="sentences with one {} each, where the caption is put in")
    choose: Literal["any", "first"] = Field("any", description="which of a picture's several captions")

    def conflicts(self) -> Iterator[Conflict]:
        """Templates without a place for the caption, or with several."""
        for i, template in enumerate(self.templates):
            if (count := template.count("{}")) != 1:
                yield Conflict(
                    (f"templates.{i}",), f"found {count} times {{}} in '{template}', expected it once"
                )


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


class Objective(Block):
    """What the denoiser learns to predict, and how errors count."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the network predicts; auto: as the base's scheduler says"
    )
    weighting: Literal["none", "min_snr"] = Field("none", description="weight of a timestep's loss")
    snr_gamma: float = Field(5.0, gt=0, description="cap on the signal-to-noise ratio, with min_snr only")
    loss: Literal["mse", "huber"] = Field("mse", description="the loss of one element")
    huber_delta: float = Field(0.1, gt=0, description="where huber turns linear, in units of the target")
    timesteps: Range | None = Field(
        None, description="timesteps trained on, [start, end): start included, end not"
    )

    def unused(self) -> dict[str, str]:
        """Numbers that belong to a weighting or loss that was not chosen."""
        unused = {}
        if self.weighting != "min_snr":
            unused["snr_gamma"] = f"it belongs to weighting min_snr, and weighting is {self.weighting}"
        if self.loss != "huber":
            unused["huber_delta"] = f"it belongs to loss huber, and loss is {self.loss}"
        return unused

    def conflicts(self) -> Iterator[Conflict]:
        """A range of timesteps that holds none."""
        if self.timesteps is not None and not 0 <= self.timesteps[0] < self.timesteps[1]:
            found = list(self.timesteps)
            yield Conflict(("timesteps",), f"found {found}, expected [start, end] with 0 <= start < end")

    def options(self) -> dict[str, Any]:
        """The keys that were chosen, by the names of objective.Objective's arguments."""
        chosen = self.resolved()
        return {key: value for key, value in chosen.items() if (key, value) != ("prediction", "auto")}


class Optimiser(Block):
    """How gradients become updates."""

    short: ClassVar[str | None] = "name"

    name: Text = Field("adamw", description="a class of torch.optim in any case, muon, adamw8bit or lion8bit")
    weight_decay: float = Field(
        0.01, ge=0, description="decay of weights at each step, times the learning rate"
    )
    betas: Betas = Field(
        (0.9, 0.999), description="decay of the gradient's first and second moment, each in [0, 1)"
    )
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")

    def conflicts(self) -> Iterator[Conflict]:
        """Betas out of range."""
        for i, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                yield Conflict((f"betas.{i}",), f"found the number {beta}, expected a number in [0, 1)")


class Checkpoint(Block):
    """What a stopped run continues from."""

    every: Positive | None = Field(
        None, description="optimiser steps between two; null: at the end and when stopped"
    )
    keep: Positive = Field(2, description="how many of the newest are kept")


class Train(Block):
    """How long and how fast."""

    steps: Positive | None = Field(None, description="optimiser steps; this or epochs")
    epochs: Positive | None = Field(None, description="passes over the data; this or steps")
    batch_size: Positive = Field(
        description="pictures in one optimiser step, over all processes and accumulation"
    )
    accumulate: Positive = Field(1, description="forward passes in one optimiser step")
    learning_rate: float = Field(gt=0, description="the highest learning rate, per optimiser step")
    optimiser: Optimiser = Field(Optimiser(), description="the optimiser's name and numbers")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="learning rate after warm-up"
    )
    warmup: Interval = Field(0, description="optimiser steps in which the learning rate rises from 0")
    clip: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="largest norm of the gradient; null: no limit"
    )
    ema: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="decay a step of the average of trained weights, below 1; null: no average"
    )
    seed: Interval = Field(0, description="what all random numbers depend on")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        "auto", description="what is computed in; auto: bf16 where the hardware has it, else fp32"
    )
    threads: Positive | None = Field(
        None, description="CPU threads of a process; null: its share of the cores"
    )
    resume: Text = Field(
        "auto", description="auto: from the output's newest checkpoint; never; or a checkpoint"
    )
    checkpoint: Checkpoint = Field(Checkpoint(), description="when checkpoints are written")

    def conflicts(self) -> Iterator[Conflict]:
        """Not exactly one of steps and epochs."""
        if self.steps is None and self.epochs is None:
            yield Conflict(("steps", "epochs"), "is missing; expected a whole number here or at epochs")
        if self.steps is not None and self.epochs is not None:
            message = "found together with steps, expected one of the two (train.steps=null takes steps away)"
            yield Conflict(("epochs", "steps"), message)


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


class Logging(Block):
    """Where figures go beside metrics.jsonl."""

    tensorboard: bool = Field(True, description="write TensorBoard files")
    wandb: Text | None = Field(None, description="Weights & Biases project; null: none")
