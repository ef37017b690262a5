"""LoRA: low-rank adapters beside chosen frozen layers (arXiv 2106.09685), injected by peft."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn

from tuner.block import Block
from tuner.errors import UserError
from tuner.export import kohya
from tuner.export.files import save
from tuner.export.metadata import Kind
from tuner.family import Family
from tuner.method import Card, Method
from tuner.text import Text, Tokens

ADAPTER = "tuner"
TARGETS = {  # regular expressions over module paths, for a UNet and for a text encoder
    "attention": (r".*\.(to_q|to_k|to_v|to_out\.0)", r".*\.(q_proj|k_proj|v_proj|out_proj)"),
    "attention+feed-forward": (
        r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)",
        r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    ),
}


class Config(Block):
    """The recipe's block."""

    short: ClassVar[str | None] = None

    rank: int = Field(8, ge=1, description="rank of the adapters")
    alpha: float | None = Field(None, gt=0, description="the adapters count alpha / rank; the rank if absent")
    targets: str = Field("attention", description=f"which layers: {', '.join(TARGETS)}")
    text_encoder: bool = Field(False, description="adapt the text encoder too")
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, description="of the text encoder's adapters; train.learning_rate if absent"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")

    def unused(self) -> dict[str, str]:
        return {} if self.text_encoder else {"text_encoder_learning_rate": "text_encoder is false"}


class Lora(Method):
    """The adapters sit in the base's layers; this module lists their weights."""

    kind: ClassVar[Kind] = "lora"
    DROP_CAPTIONS: ClassVar[float] = 0.1

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self.CACHES_TEXT = not config.text_encoder
        self.places: list[str] = []  # the adapters' weights by name, as long as `weights`
        weights: list[nn.Parameter] = []
        self.hosts: dict[str, nn.Module] = {"unet": family.denoiser}
        if config.text_encoder:
            self.hosts |= family.text_encoders
        for component, module in self.hosts.items():
            unread = family.unread(component) if component != "unet" else ()
            self._inject(component, module, seed, unread)
            for name, parameter in module.named_parameters():
                if f".{ADAPTER}." in name:
                    self.places.append(f"{component}.{name}")
                    parameter.requires_grad_(True)
                    weights.append(parameter)
        self.weights = nn.ParameterList(weights)

    def _inject(self, component: str, module: nn.Module, seed: int, unread: Sequence[str]) -> None:
        """Put the adapters in; not where nothing reads what they do, as they would never get a gradient."""
        from peft import LoraConfig, inject_adapter_in_model

        presets = TARGETS.get(self.config.targets)
        if presets is None:
            raise UserError(
                f"method.lora.targets: {self.config.targets}: expected one of {', '.join(TARGETS)}"
            )
        settings = LoraConfig(
            r=self.config.rank,
            lora_alpha=self.alpha,
            target_modules=presets[0 if component == "unet" else 1],
            lora_dropout=self.config.dropout,
            exclude_modules="|".join(rf"{re.escape(path)}\..*" for path in unread) or None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(settings, module, adapter_name=ADAPTER)

    @property
    def alpha(self) -> float:
        return float(self.config.rank if self.config.alpha is None else self.config.alpha)

    @property
    def scale(self) -> float:
        """What multiplies up @ down."""
        return self.alpha / self.config.rank

    def labels(self) -> dict[str, Any]:
        return {"rank": self.config.rank, "alpha": self.alpha}

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.places, self.weights, strict=True))

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The UNet's adapters, and the text encoders' with their own learning rate."""
        own = self.config.text_encoder_learning_rate or learning_rate
        named = self.trained().items()
        unet = {"params": [p for name, p in named if name.startswith("unet.")]}
        text = {"params": [p for name, p in named if not name.startswith("unet.")], "lr": own}
        return [unet, text] if text["params"] else [unet]

    def encode(self, family: Family, tokens: Tokens) -> Text:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.text_encoder):
            return family.encode_prompts(tokens)

    def train_mode(self, on: bool) -> None:
        """Only the adapters' dropout changes; the base stays as it is."""
        super().train_mode(on)
        for layer in self._layers():
            layer.lora_dropout.train(on)

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """The base, bitwise: the adapters are passed by."""
        for layer in self._layers():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers():
                layer.enable_adapters(True)
                layer.requires_grad_(False)
            for weight in self.weights:
                weight.requires_grad_(True)

    def _layers(self) -> Iterator[Any]:
        from peft.tuners.lora import LoraLayer

        for module in self.hosts.values():
            yield from (layer for layer in module.modules() if isinstance(layer, LoraLayer))

    def modules_by_path(self) -> dict[str, kohya.LoraModule]:
        """The adapters as down, up and scale, by component and module path."""
        state = {name.replace(f".{ADAPTER}.", "."): p.detach() for name, p in self.trained().items()}
        paths = {name.rsplit(".lora_", 1)[0] for name in state}
        return kohya.from_peft(state, dict.fromkeys(sorted(paths), self.scale))

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """`NAME.safetensors` in kohya names, which every tool loads."""
        tensors = card.cast(kohya.to_kohya(self.modules_by_path()))
        return [save(folder / f"{card.name}.safetensors", tensors, card.header(self.kind, tensors))]


METHOD = Lora
