"""Full fine-tuning and DreamBooth (arXiv 2208.12242): the denoiser itself, and if asked the text encoders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner import components
from tuner.block import Block, Conflict
from tuner.errors import UserError
from tuner.export import original
from tuner.export.cldm import LayoutError
from tuner.export.component import save_component
from tuner.export.files import folder_whole, save
from tuner.export.metadata import Kind
from tuner.family import Family
from tuner.files import pipeline
from tuner.method import Card, Method, Prior, public_config


class Config(Block):
    """The recipe's block."""

    unet: bool = Field(True, description="train the denoiser")
    text_encoder: bool = Field(False, description="train the text encoder too; of two both")
    text_encoder_learning_rate: float | None = Field(
        None, gt=0, description="of the text encoders; train.learning_rate if absent"
    )
    prior: Prior | None = Field(None, description="class pictures that are half of every batch (DreamBooth)")
    checkpoint_file: bool = Field(
        True, description="export, besides, the whole model as one file in the original layout"
    )
    pipeline: bool = Field(
        True, description="export diffusers/ as a whole pipeline; false: the trained networks' folders alone"
    )

    def unused(self) -> dict[str, str]:
        return {} if self.text_encoder else {"text_encoder_learning_rate": "text_encoder is false"}

    def conflicts(self) -> Iterator[Conflict]:
        """Nothing that is trained."""
        if not self.unet and not self.text_encoder:
            yield Conflict(
                ("unet", "text_encoder"), "found false, as text_encoder: expected one of them true"
            )


class Full(Method):
    """Trains all of the denoiser, and of the text encoders what the denoiser is told of.

    What no output of a text encoder depends on (SDXL's first one is read before its last layer) stays as it
    is: it would never get a gradient.
    """

    kind: ClassVar[Kind] = "full"
    TRAINS: ClassVar[tuple[str, ...]] = ("unet",)
    DROP_CAPTIONS: ClassVar[float] = 0.1

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self.CACHES_TEXT = not config.text_encoder
        self.folder: Path | None = getattr(family, "folder", None)
        if config.unet:
            self.denoiser = family.denoiser.requires_grad_(True)
        self.text_encoders = nn.ModuleDict(family.text_encoders if config.text_encoder else {})
        if config.text_encoder:
            for parameter in _read(family):
                parameter.requires_grad_(True)
        if config.checkpoint_file:
            _check_layout(family)

    @classmethod
    def exact(cls, config: Config) -> tuple[str, ...]:
        return ("unet",) * config.unet + ("text_encoder",) * config.text_encoder

    @property
    def prior(self) -> Prior | None:
        return self.config.prior

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, by component name."""
        unet = {"unet": self.denoiser} if self.config.unet else {}
        return {**unet, **dict(self.text_encoders.items())}

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The denoiser, and the text encoders with their own learning rate."""
        text = [p for p in self.text_encoders.parameters() if p.requires_grad]
        own = self.config.text_encoder_learning_rate or learning_rate
        groups: list[dict[str, Any]] = []
        if self.config.unet:
            groups.append({"params": list(self.denoiser.parameters())})
        return groups + ([{"params": text, "lr": own}] if text else [])

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """The pipeline's folder `diffusers/` (or the trained networks' below it), and `NAME.safetensors`.

        Returns:
            The weights that were trained; what the pipeline has of the base lies beside.
        """
        whole = folder / "diffusers"
        written = []
        with folder_whole(whole) as beside:
            for name, network in self.networks().items():
                tensors = card.cast(network.state_dict())
                header, config = card.header(self.kind, tensors), public_config(network)
                path = save_component(beside / name, config, tensors, header, _weights_file(name))
                written.append(whole / path.relative_to(beside))
            if self.config.pipeline:
                self._complete(family, beside)
        if self.config.checkpoint_file:
            tensors = card.cast(self.whole(family))
            path = folder / f"{card.name}.safetensors"
            written.append(save(path, tensors, card.header(self.kind, tensors)))
        return written

    def _complete(self, family: Family, place: Path) -> None:
        """Put beside the trained networks what a pipeline has besides: of the base, as its files have it."""
        assert self.folder is not None, "a base has a folder"
        names = list(original.PLACES[family.name])
        for name in (name for name in names if name not in self.networks()):
            source = _source(family, name)
            if source is not None:
                pipeline.copy_component(source, place / name)
            else:  # drawn at random, and frozen
                network = family.modules()[name]
                tensors = {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}
                save_component(place / name, public_config(network), tensors, {}, _weights_file(name))
        for name in (n.replace("text_encoder", "tokenizer") for n in names if n.startswith("text_encoder")):
            pipeline.copy_tokenizer(self.folder / name, place / name)
        pipeline.write_scheduler(self.folder / "scheduler", place / "scheduler", family.scheduler_config)
        networks = {name: components.KINDS[name] for name in names}
        kind = f"{family.PIPELINES}{'Inpaint' * family.inpainting}Pipeline"
        pipeline.write_index(self.folder, place, kind, networks)

    def whole(self, family: Family) -> dict[str, Tensor]:
        """The model in the original layout: what was trained, and the rest as the base's files have it."""
        states = {name: self.state(family, name) for name in original.PLACES[family.name]}
        return original.to_original(states, _configs(family), family.name)

    def state(self, family: Family, name: str) -> dict[str, Tensor]:
        """A network's tensors: as trained, or as the base's file has them."""
        own = self.networks()
        network = own[name] if name in own else _frozen(family, name)
        return {key: tensor.detach().cpu() for key, tensor in network.state_dict().items()}


def _read(family: Family) -> list[nn.Parameter]:
    """The text encoders' parameters that the encoding of a text depends on."""
    encoders = family.text_encoders.values()
    parameters = [p for encoder in encoders for p in encoder.requires_grad_(True).parameters()]
    with torch.enable_grad():
        text = family.encode_prompts(family.tokenize([""]).to(family.device))
        total = text.hidden.sum() + (0.0 if text.pooled is None else text.pooled.sum())
        found: tuple[Tensor | None, ...] = torch.autograd.grad(total, parameters, allow_unused=True)
    for encoder in encoders:
        encoder.requires_grad_(False)
    return [p for p, gradient in zip(parameters, found, strict=True) if gradient is not None]


def _frozen(family: Family, name: str) -> nn.Module:
    """A network that is not trained, from its file: in memory it may be held in half precision."""
    source = _source(family, name)
    return family.modules()[name] if source is None else components.load(name, source)


def _source(family: Family, name: str) -> Path | None:
    """The folder that a network of the base was loaded from; None where it was drawn at random."""
    folder: Path | None = getattr(family, "folder", None)
    new = family.digests.get(name, "").startswith("new ") if hasattr(family, "digests") else False
    if folder is None or new:
        return None
    own_vae = name == "vae" and family.options.vae is not None
    return cast(Path, family.options.vae) if own_vae else folder / name


def _weights_file(name: str) -> str:
    """How its library calls a network's weights."""
    diffusers = components.KINDS[name][0] == "diffusers"
    return f"{components.WEIGHTS}.safetensors" if diffusers else "model.safetensors"


def _configs(family: Family) -> Mapping[str, Mapping[str, Any]]:
    found = {name: public_config(network) for name, network in family.modules().items()}
    return {**found, "scheduler": family.scheduler_config}


def _check_layout(family: Family) -> None:
    """Raises UserError, before anything is trained, where the base does not fit into the original layout."""
    modules = family.modules()
    names = original.PLACES[family.name]
    states = {name: {k: t.to("meta") for k, t in modules[name].state_dict().items()} for name in names}
    try:
        original.to_original(states, _configs(family), family.name)
    except LayoutError as error:
        raise UserError(f"method.full.checkpoint_file: {error}; set it to false") from error


METHOD = Full
