"""The recipe's block of LoRA and kin: `method.lora`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tuner.adapters.layers import Kind, Making
from tuner.adapters.targets import PRESETS, Wish
from tuner.block import Block, Conflict, OneOrMore
from tuner.method import Prior

Encoder = Literal["text_encoder", "text_encoder_2"]
INITS: Mapping[str, tuple[str, ...]] = {
    "lora": ("default", "gaussian", "orthogonal"),
    "dora": ("default", "gaussian", "orthogonal"),
    "loha": ("default",),
    "lokr": ("default", "lycoris"),
}
ONLY: Mapping[str, tuple[str, ...]] = {  # keys that some kinds have a use for
    "rslora": ("lora", "dora"),
    "lora_plus_ratio": ("lora", "dora"),
    "factor": ("lokr",),
    "decompose_both": ("lokr",),
    "tucker": ("loha", "lokr"),
}
FROM_START = ("kind", "rank", "alpha", "targets", "unet", "text_encoder")  # a start's file says them too
NOT_WITH_START = ("rslora", "init", "factor", "decompose_both", "tucker")


class Pattern(Block):
    """What is otherwise for some of the adapters."""

    match: str = Field(description="regular expression for the whole path of a layer", min_length=1)
    rank: int | None = Field(None, ge=1, description="their rank; null: as for all")
    alpha: float | None = Field(None, gt=0, description="their alpha; null: as for all")
    learning_rate: float | None = Field(None, gt=0, description="their learning rate; null: their network's")

    def conflicts(self) -> Iterator[Conflict]:
        if self.rank is None and self.alpha is None and self.learning_rate is None:
            yield Conflict(("match",), "has no effect: expected rank, alpha or learning_rate beside it")
        if problem := _bad_pattern(self.match):
            yield Conflict(("match",), problem)


class Merge(Block):
    """A LoRA or kin that is added to the base before training."""

    short: ClassVar[str | None] = "file"

    file: str = Field(description="a .safetensors file", min_length=1)
    weight: float = Field(1.0, description="what its change is multiplied with")

    def conflicts(self) -> Iterator[Conflict]:
        if self.weight == 0:
            yield Conflict(("weight",), "found the number 0, with which the file has no effect")


class Config(Block):
    """The recipe's block."""

    kind: Kind = Field("lora", description="LoRA, DoRA (weight-decomposed), LoHa or LoKr (LyCORIS)")
    rank: int = Field(8, ge=1, description="rank of the adapters")
    alpha: float | None = Field(
        None, gt=0, description="the adapters count alpha / rank; null: the rank, so they count 1"
    )
    targets: str | list[str] = Field(
        "attention",
        description=f"which layers: {', '.join(PRESETS)}, or regular expressions for whole paths of layers",
    )
    patterns: list[Pattern] = Field(
        [], description="blocks {match, rank, alpha, learning_rate}; for a layer the first that fits counts"
    )
    unet: bool = Field(True, description="adapt the UNet")
    text_encoder: bool | list[Encoder] = Field(
        False, description="adapt the text encoder too; of two both, or those that are named"
    )
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, description="of the text encoders' adapters; train.learning_rate if absent"
    )
    text_encoder_2_learning_rate: float | None = Field(
        None, gt=0, description="of the second text encoder's adapters; as the first's if absent"
    )
    lora_plus_ratio: float | None = Field(
        None, gt=0, description="the second factor's learning rate over the first's (LoRA+); null: the same"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout before the adapters; loha, lokr: of rows of their change"
    )
    rslora: bool = Field(False, description="the adapters count alpha / sqrt(rank)")
    init: Literal["default", "gaussian", "orthogonal", "lycoris"] = Field(
        "default", description="how the adapters begin; gaussian, orthogonal: lora, dora; lycoris: lokr"
    )
    factor: int | None = Field(
        None, ge=2, description="lokr: size of the first factor; null: near the square root of the layer's"
    )
    decompose_both: bool = Field(False, description="lokr: the first factor is low-rank too")
    tucker: bool = Field(False, description="loha, lokr: a core tensor for convolutions larger than 1x1")
    start: str | None = Field(
        None, min_length=1, description="a LoRA or kin, of any tool, to train further; it says kind and ranks"
    )
    merge: Annotated[list[Merge], OneOrMore()] = Field([], description="files added to the base first")
    prior: Prior | None = Field(None, description="class pictures that are half of every batch (DreamBooth)")

    def unused(self) -> dict[str, str]:
        given = self.model_fields_set
        unused: dict[str, str] = {}
        if self.start is not None:
            unused |= {key: "start's file says it" for key in FROM_START if key not in given}
            unused |= dict.fromkeys(NOT_WITH_START, "start's file says it")
        if self.start is None or "kind" in given:
            for key, kinds in ONLY.items():
                if self.kind not in kinds:
                    unused.setdefault(key, f"it belongs to kind {' or '.join(kinds)}, not to {self.kind}")
        if self.start is None or "text_encoder" in given:
            named = self.text_encoder if isinstance(self.text_encoder, list) else []
            if not self.text_encoder:
                unused["text_encoder_learning_rate"] = "text_encoder is false"
                unused["text_encoder_2_learning_rate"] = "text_encoder is false"
            elif named and "text_encoder_2" not in named:
                unused["text_encoder_2_learning_rate"] = "text_encoder does not name text_encoder_2"
        return unused

    def conflicts(self) -> Iterator[Conflict]:
        """Expressions that are none, nothing to adapt, what does not go with `kind` or `start`."""
        several = isinstance(self.targets, list)
        for i, target in enumerate(self.targets if isinstance(self.targets, list) else [self.targets]):
            if problem := _bad_pattern(target):
                yield Conflict((f"targets.{i}" if several else "targets",), problem)
        if not self.targets:
            yield Conflict(("targets",), "found nothing, expected a preset or regular expressions")
        if self.start is None and not self.unet and not self.text_encoder:
            yield Conflict(("unet", "text_encoder"), "found false, and text_encoder too: nothing is adapted")
        named = self.text_encoder if isinstance(self.text_encoder, list) else ["any"]
        if len(set(named)) != max(1, len(named)):
            yield Conflict(("text_encoder",), "expected true, false, or names of text encoders, each once")
        if self.start is None and self.init not in INITS[self.kind]:
            choice = ", ".join(INITS[self.kind])
            yield Conflict(("init", "kind"), f"found {self.init}, kind {self.kind} has {choice}")
        if self.prior is not None and self.prior.source is None and (self.start is not None or self.merge):
            told = "is missing; the base alone draws class pictures, and start or merge changes it: give some"
            yield Conflict(("prior.source",), told)
        for i, pattern in enumerate(self.patterns if self.start is not None else []):
            for key in ("rank", "alpha"):
                if getattr(pattern, key, None) is not None:
                    yield Conflict((f"patterns.{i}.{key}", "start"), "has no effect: start's file says it")

    def wishes(self) -> list[Wish]:
        """The patterns; a rank without an alpha has the alpha of all, or itself as the others do."""
        wishes = []
        for pattern in self.patterns:
            alpha = pattern.alpha
            if alpha is None and pattern.rank is not None:
                alpha = float(pattern.rank) if self.alpha is None else self.alpha
            wishes.append(Wish(pattern.match, pattern.rank, alpha, pattern.learning_rate))
        return wishes

    def making(self) -> Making:
        """How adapters are made, without a file to start from."""
        return Making(
            self.kind, self.rslora, self.dropout, self.init, self.factor, self.decompose_both, self.tucker
        )


def _bad_pattern(text: str) -> str | None:
    """What is wrong with a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        return f"found {text}, which is no regular expression: {error}"
    return None
