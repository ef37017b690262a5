"""The blocks of a recipe that say what is learned and how: `objective` and `train`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tuner.block import Block, Conflict
from tuner.blocks import Interval, Positive, Share, Text

# Not strict: YAML has lists only.
Betas = Annotated[tuple[float, float], Field(strict=False)]
Range = Annotated[tuple[int, int], Field(strict=False)]
Piece = Annotated[tuple[int, float], Field(strict=False)]
Schedule = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "rex",
    "inverse_sqrt",
    "piecewise_constant",
]


class Objective(Block):
    """What the denoiser learns to predict, and how errors count."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = Field(
        "auto", description="what the network predicts; auto: as the base's scheduler says"
    )
    zero_terminal_snr: bool = Field(
        False, description="change the noise schedule so that its end is noise alone; needs v_prediction"
    )
    weighting: Literal["none", "min_snr", "soft_min_snr", "debiased", "p2", "as_epsilon", "as_v", "as_x0"] = (
        Field(
            "none",
            description="weight of a timestep's loss; as_...: as if epsilon, v or the picture were predicted",
        )
    )
    snr_gamma: float = Field(
        5.0, gt=0, description="cap on the signal-to-noise ratio, with min_snr and soft_min_snr only"
    )
    p2_gamma: float = Field(1.0, gt=0, description="power of the weight 1 / (p2_k + snr), with p2 only")
    p2_k: float = Field(1.0, gt=0, description="added to the signal-to-noise ratio, with p2 only")
    loss: Literal["mse", "l1", "huber", "smooth_l1"] = Field("mse", description="the loss of one element")
    huber_delta: float = Field(
        0.1, gt=0, description="where huber and smooth_l1 turn linear, in units of the target"
    )
    huber_schedule: Literal["constant", "exponential", "snr"] = Field(
        "constant", description="huber_delta at each timestep: as it is, or from 1 without noise down to it"
    )
    timesteps: Range | None = Field(
        None, description="timesteps trained on, [start, end): start included, end not"
    )
    timestep_shape: Literal["uniform", "logit_normal", "mode", "cosmap", "cubic"] = Field(
        "uniform",
        description="how often each timestep is drawn; logit_normal, mode, cosmap: the middle more often, "
        "cubic: the noisy end",
    )
    logit_mean: float = Field(0.0, description="with logit_normal; above 0: noisier timesteps")
    logit_std: float = Field(1.0, gt=0, description="with logit_normal; the smaller, the narrower")
    mode_scale: float = Field(
        1.29, ge=-1, le=2 / (math.pi - 2), description="with mode; above 0: the middle, below 0: the ends"
    )
    timestep_draw: Literal["independent", "even"] = Field(
        "independent", description="even: consecutive samples spread over all timesteps; less noisy gradients"
    )
    offset_noise: float = Field(
        0.0, ge=0, description="a random number of this deviation for a whole channel, added to its noise"
    )
    pyramid_noise: Share = Field(
        0.0, description="weight of noise of half the resolution, squared for a quarter and so on; 0: none"
    )
    pyramid_levels: Positive = Field(6, description="how often the resolution is halved at most")
    input_perturbation: float = Field(
        0.0, ge=0, description="deviation of noise in the input that the target does not have"
    )

    def unused(self) -> dict[str, str]:
        """Numbers that belong to something that was not chosen."""
        belongs = {
            "snr_gamma": ("weighting", ("min_snr", "soft_min_snr")),
            "p2_gamma": ("weighting", ("p2",)),
            "p2_k": ("weighting", ("p2",)),
            "huber_delta": ("loss", ("huber", "smooth_l1")),
            "huber_schedule": ("loss", ("huber", "smooth_l1")),
            "logit_mean": ("timestep_shape", ("logit_normal",)),
            "logit_std": ("timestep_shape", ("logit_normal",)),
            "mode_scale": ("timestep_shape", ("mode",)),
        }
        unused = _unused(self, belongs)
        if not self.pyramid_noise:
            unused["pyramid_levels"] = "it belongs to pyramid_noise, and pyramid_noise is 0"
        return unused

    def conflicts(self) -> Iterator[Conflict]:
        """A range of timesteps that holds none; choices that a prediction makes impossible or idle."""
        if self.timesteps is not None and not 0 <= self.timesteps[0] < self.timesteps[1]:
            found = list(self.timesteps)
            yield Conflict(("timesteps",), f"found {found}, expected [start, end] with 0 <= start < end")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            message = "needs prediction v_prediction (noise alone says nothing of the picture), found epsilon"
            yield Conflict(("zero_terminal_snr", "prediction"), message)
        if (self.prediction, self.weighting) in (("epsilon", "as_epsilon"), ("v_prediction", "as_v")):
            message = f"found {self.weighting}, which has no effect where prediction is {self.prediction}"
            yield Conflict(("weighting", "prediction"), message)

    def options(self) -> dict[str, Any]:
        """What was chosen of objective.Options, by its names."""
        chosen = {key: value for key, value in self.resolved().items() if key not in _DRAWS}
        return {key: value for key, value in chosen.items() if (key, value) != ("prediction", "auto")}

    def draws(self) -> dict[str, Any]:
        """What was chosen of data.noise.Draws, by its names."""
        return {key: value for key, value in self.resolved().items() if key in _DRAWS}


_DRAWS = ("timestep_draw", "offset_noise", "pyramid_noise", "pyramid_levels", "input_perturbation")


class Optimiser(Block):
    """How gradients become updates."""

    short: ClassVar[str | None] = "name"

    name: Text = Field(
        "adamw",
        description="a class of torch.optim, lion, muon, adamw8bit, lion8bit, pagedadamw8bit, "
        "pagedadamw32bit, pagedlion8bit, prodigy, adamwschedulefree, radamschedulefree or sgdschedulefree",
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="decay of weights at each step, times the learning rate; null: the optimiser's own"
    )
    betas: Betas | None = Field(
        None, description="decay of the gradient's moments, each in [0, 1); null: the optimiser's own"
    )
    eps: Annotated[float, Field(gt=0)] | None = Field(
        None, description="added to the root of the second moment; null: the optimiser's own"
    )
    options: dict[str, Any] = Field(
        {}, description="further arguments of the optimiser's class, by name: {momentum: 0.9}"
    )

    def conflicts(self) -> Iterator[Conflict]:
        """Betas out of range; options that are no plain values."""
        for i, beta in enumerate(self.betas or ()):
            if not 0 <= beta < 1:
                yield Conflict((f"betas.{i}",), f"found the number {beta}, expected a number in [0, 1)")
        for name, value in self.options.items():
            for part in value if isinstance(value, list) else [value]:
                plain = part is None or isinstance(part, (bool, int, str))
                if not plain and not (isinstance(part, float) and math.isfinite(part)):
                    message = "expected a finite number, text, true, false, null, or a list of these"
                    yield Conflict((f"options.{name}",), message)


class Checkpoint(Block):
    """What a stopped run continues from."""

    every: Positive | None = Field(
        None, description="optimiser steps between two; null: at the end and when stopped"
    )
    keep: Positive = Field(2, description="how many of the newest are kept")
    keep_every: Positive | None = Field(
        None, description="those at multiples of so many steps are kept for good; null: none"
    )
    keep_hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="those written within so many hours are kept too; null: none"
    )


class Guard(Block):
    """What a run does when it goes wrong; what is looked for: tuner/guard.py."""

    short: ClassVar[str | None] = "policy"

    policy: Literal["stop", "back", "off"] = Field(
        "stop",
        description="stop: with the last good checkpoint kept; back: go on from that checkpoint (or from the "
        "start) with a lower learning rate; off: only numbers that are not finite stop the run",
    )
    times: Positive = Field(2, description="with back: how often, at most; then it stops")
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="with back: every learning rate is multiplied by this, each time"
    )

    def unused(self) -> dict[str, str]:
        """What only going back needs."""
        if self.policy == "back":
            return {}
        return dict.fromkeys(("times", "factor"), f"it belongs to policy back, and policy is {self.policy}")


class Train(Block):
    """How long and how fast."""

    steps: Positive | None = Field(None, description="optimiser steps; this or epochs")
    epochs: Positive | None = Field(None, description="passes over the data; this or steps")
    batch_size: Positive = Field(
        description="pictures in one optimiser step, over all processes and accumulation"
    )
    accumulate: Positive = Field(1, description="forward passes in one optimiser step")
    learning_rate: float = Field(
        gt=0, description="the highest learning rate, per optimiser step; 1 for prodigy, which finds its own"
    )
    optimiser: Optimiser = Field(Optimiser(), description="the optimiser's name and numbers")
    schedule: Schedule = Field("constant", description="learning rate after warm-up")
    schedule_end: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the learning rate that a falling schedule ends at"
    )
    schedule_cycles: Annotated[int, Field(ge=2)] = Field(
        2, description="how often the learning rate falls, with cosine_with_restarts"
    )
    schedule_power: float = Field(
        2.0, gt=0, description="with polynomial; 1: a straight line, above 1: falls fast at first"
    )
    schedule_pieces: list[Piece] = Field(
        [], description="with piecewise_constant: [step, factor] pairs; the rate's factor from that step on"
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
    trained_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="what trained weights and gradients are held in; bf16: half of it, and updates are "
        "rounded up or down at random (stochastic rounding); needs precision bf16",
    )
    gradient_checkpointing: bool = Field(
        False, description="keep less of the forward pass and compute it again: less memory, more time"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="compile the networks (torch.compile); auto: on a GPU, where by the first steps "
        "it saves more time than it takes",
    )
    deterministic: bool = Field(
        False, description="on a GPU the same bits every time, at some cost; the CPU's are so anyway"
    )
    threads: Positive | None = Field(
        None, description="CPU threads of a process; null: its share of the cores"
    )
    resume: Text = Field(
        "auto", description="auto: from the output's newest checkpoint; never; or a checkpoint"
    )
    checkpoint: Checkpoint = Field(Checkpoint(), description="when checkpoints are written")
    guard: Guard = Field(Guard(), description="what happens when training goes wrong")

    def unused(self) -> dict[str, str]:
        """Numbers that belong to a schedule that was not chosen."""
        falling = ("linear", "cosine", "cosine_with_restarts", "polynomial", "rex")
        return _unused(
            self,
            {
                "schedule_end": ("schedule", falling),
                "schedule_cycles": ("schedule", ("cosine_with_restarts",)),
                "schedule_power": ("schedule", ("polynomial",)),
                "schedule_pieces": ("schedule", ("piecewise_constant",)),
            },
        )

    def schedule_options(self) -> dict[str, Any]:
        """The numbers of the schedule that was chosen, by the names of optimiser.schedule's arguments."""
        before = "schedule_"
        return {k.removeprefix(before): v for k, v in self.resolved().items() if k.startswith(before)}

    def conflicts(self) -> Iterator[Conflict]:
        """Not exactly one of steps and epochs; a schedule without what it needs or without a place."""
        yield from self._schedule_conflicts()
        if self.steps is None and self.epochs is None:
            yield Conflict(("steps", "epochs"), "is missing; expected a whole number here or at epochs")
        if self.steps is not None and self.epochs is not None:
            message = "found together with steps, expected one of the two (train.steps=null takes steps away)"
            yield Conflict(("epochs", "steps"), message)
        if self.trained_precision == "bf16" and self.precision in ("fp32", "fp16"):
            message = f"found bf16, but precision is {self.precision}: expected fp32, or precision bf16"
            yield Conflict(("trained_precision", "precision"), message)

    def _schedule_conflicts(self) -> Iterator[Conflict]:
        if self.schedule == "piecewise_constant":
            given: Sequence[Sequence[float]] = self.schedule_pieces
            pieces = [piece for piece in given if len(piece) == 2]  # a faulty one is shorter
            steps = [step for step, _ in pieces]
            rising = steps == sorted(set(steps)) and all(step >= 1 for step in steps)
            if not pieces or not rising or any(factor < 0 for _, factor in pieces):
                found = [list(piece) for piece in self.schedule_pieces]
                wanted = "[[step, factor], ...], steps rising from 1, factors from 0"
                yield Conflict(("schedule_pieces", "schedule"), f"found {found}, expected {wanted}")
        if self.schedule == "inverse_sqrt" and not self.warmup:
            message = "found the number 0, but inverse_sqrt falls from the warm-up's length on: give one"
            yield Conflict(("warmup", "schedule"), message)
        if self.optimiser.name.lower().endswith("schedulefree"):
            instead = f"but {self.optimiser.name} averages the weights instead"
            if self.schedule != "constant":
                message = f"found {self.schedule}, {instead}: take constant"
                yield Conflict(("schedule", "optimiser.name"), message)
            if self.ema is not None:
                message = f"found the number {self.ema}, {instead}: take null"
                yield Conflict(("ema", "optimiser.name"), message)


def _unused(block: Block, belongs: Mapping[str, tuple[str, tuple[str, ...]]]) -> dict[str, str]:
    """The keys that need another key to be one of some values, where it is not; with the reason."""
    return {
        key: f"it belongs to {other} {' or '.join(values)}, and {other} is {getattr(block, other)}"
        for key, (other, values) in belongs.items()
        if getattr(block, other) not in values
    }
