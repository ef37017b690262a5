"""ControlNet: a trained clone of the denoiser's encoder, joined by zero convolutions (arXiv 2302.05543)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tuner import components
from tuner.adapters import controlnets, factors
from tuner.batch import Batch
from tuner.block import Block, Conflict
from tuner.data.conditions import Condition, parameters
from tuner.errors import UserError
from tuner.export import cldm, control_lora
from tuner.export.component import save_component
from tuner.export.files import save
from tuner.export.metadata import Kind
from tuner.family import Cond, Family
from tuner.files import bases
from tuner.method import Card, Method, public_config

LUMA = (0.299, 0.587, 0.114)
"""What a grey picture is made of (ITU-R BT.601, as Pillow's `L`)."""

GAUSSIAN = 0.02
"""Deviation of the output convolutions' weights with `init: gaussian`, the ablation of section 4.2."""

DECODER = ("up_blocks", "conv_norm_out", "conv_out")


class Config(Block):
    """The recipe's block."""

    short: ClassVar[str | None] = "condition"

    condition: Condition = Field(Condition(kind="canny"), description="the condition pictures")
    conditioning_channels: int = Field(
        3, description="channels of the condition that the branch sees: 3, or 1 (grey)"
    )
    start: str | None = Field(
        None,
        min_length=1,
        description="a ControlNet to go on from: a diffusers folder or a .safetensors file",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="low-rank: factors of at most this rank beside the base's frozen weights are trained, "
        "and exported as a small Control-LoRA file besides; null: the whole clone",
    )
    init: Literal["zero", "gaussian"] = Field(
        "zero", description="how the branch's output convolutions begin; gaussian is an ablation"
    )
    arch: Literal["full", "lite"] = Field(
        "full", description="lite: the same blocks without attention, drawn instead of cloned; an ablation"
    )
    unlock_decoder_at: int | None = Field(
        None, ge=0, description="optimiser step from which the base's decoder is trained too; null: never"
    )
    decoder_learning_rate: float | None = Field(
        None, gt=0, description="of the base's decoder; train.learning_rate if absent"
    )

    @field_validator("conditioning_channels")
    @classmethod
    def _readable(cls, value: int) -> int:
        if value not in (1, 3):
            raise ValueError(
                f"expected 3 or 1, found {value}: a condition is one picture file; several for one sample "
                "are not read yet"
            )
        return value

    def unused(self) -> dict[str, str]:
        begins = dict.fromkeys(("init", "arch"), "start says it") if self.start is not None else {}
        locked = (
            {} if self.unlock_decoder_at is not None else {"decoder_learning_rate": "it is never unlocked"}
        )
        return begins | locked

    def conflicts(self) -> Iterator[Conflict]:
        if self.rank is not None and self.arch == "lite":
            yield Conflict(
                ("rank",),
                "found together with arch: lite, whose weights are drawn: the base has none for a low-rank "
                "change; expected null, or arch: full",
            )


class ControlNet(Method):
    """The clone with its condition encoder is trained; the whole base is frozen.

    With `unlock_decoder_at` (the released code's `sd_locked: False`) the base's decoder is a parameter from
    the start, so that every process and every checkpoint has the same ones; until that step its gradients are
    taken away before the update, so that it stays as it is bitwise and no optimiser state is made for it.

    With `rank` the clone's weights are the base's own, frozen, each with a low-rank change that is trained
    (tuner/adapters/factors.py). Trained whole are the layers that the base does not have (condition encoder,
    zero convolutions, an inpainting base's first convolution) and the norms, which the published Control-LoRA
    files hold whole. They hold the other layers' biases too, but diffusers does not read those: they stay the
    base's.
    """

    kind: ClassVar[Kind] = "controlnet"
    DROP_CAPTIONS: ClassVar[float] = 0.5

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self._off = False
        start = None if config.start is None else Path(config.start)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the condition encoder is drawn; the clone and the zeros are not
            branch: Any = family.control_branch(config.conditioning_channels)
            if config.arch == "lite":
                branch = _lite(branch)
            if config.init == "gaussian":
                _draw_outputs(branch)
            branch.float()
            if config.rank is not None:
                controlnets.factor(branch, family, config.rank, start)
            elif start is not None:
                controlnets.fill(branch, start)
        self.branch: nn.Module = branch.requires_grad_(True)
        self.decoder = nn.ModuleDict()
        self._locked: dict[str, Tensor] = {}
        if config.unlock_decoder_at is not None:
            self._register_decoder(family)

    def _register_decoder(self, family: Family) -> None:
        if family.options.quantise is not None:
            raise UserError(
                "method.controlnet.unlock_decoder_at: the decoder must keep its precision: "
                f"found base.quantise: {family.options.quantise}, expected null"
            )
        self.decoder.update({name: family.denoiser.get_submodule(name) for name in DECODER})
        self.decoder.requires_grad_(True)
        self._locked = {name: t.detach().cpu().clone() for name, t in self.decoder.state_dict().items()}

    def labels(self) -> dict[str, Any]:
        return {"condition": parameters(self.config.condition)}

    @property
    def condition(self) -> Condition | None:
        return self.config.condition

    def look(self, picture: Tensor) -> Tensor:
        if self.config.conditioning_channels == 3:
            return picture
        shares = torch.tensor(LUMA, dtype=picture.dtype, device=picture.device)
        return (picture * shares[:, None, None]).sum(dim=1, keepdim=True).clamp(-1.0, 1.0)

    def predict(self, family: Family, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        if self._off:
            return super().predict(family, x_t, t, cond, batch)
        assert batch.condition is not None
        control = family.control(self.branch, x_t, t, cond, self.look(batch.condition))
        return family.predict(family.denoiser, x_t, t, cond, control)

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """The branch, and the base's decoder with its own learning rate."""
        groups: list[dict[str, Any]] = [{"params": list(self.branch.parameters())}]
        own = self.config.decoder_learning_rate or learning_rate
        decoder = list(self.decoder.parameters())
        return groups + ([{"params": decoder, "lr": own}] if decoder else [])

    def before_update(self, step: int) -> None:
        """Until it is unlocked the decoder has no gradient: it does not move, and counts in no norm."""
        if self.config.unlock_decoder_at is not None and step < self.config.unlock_decoder_at:
            for parameter in self.decoder.parameters():
                parameter.grad = None

    def depends(self) -> dict[str, Path]:
        if self.config.start is None:
            return {}
        start = Path(self.config.start)
        found = [start] if start.is_file() else [start / "config.json", *bases.weights_files(start)]
        return {f"method.controlnet.start {path.name}": path for path in found}

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """The base, bitwise: the branch is left out, an unlocked decoder is as it was."""
        self._off = True
        trained = {name: tensor.detach().clone() for name, tensor in self.decoder.state_dict().items()}
        try:
            self.decoder.load_state_dict(self._locked)
            yield
        finally:
            self.decoder.load_state_dict(trained)
            self._off = False

    def control_branch(self) -> nn.Module | None:
        return self.branch

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """The folder `diffusers/`; for the other tools, where they can read it, one file in the original
        layout; with a rank the factors in `control_lora/`; and the folder `unet/` of a base whose decoder was
        unlocked."""
        config, state = public_config(self.branch), card.cast(self.whole(family))
        written = [save_component(folder / "diffusers", config, state, card.header(self.kind, state))]
        if config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
            tensors = cldm.to_cldm(state, config)
            name = f"control_{family.version}_{card.name}.safetensors"
            written.append(save(folder / name, tensors, card.header(self.kind, tensors)))
        if self.config.rank is not None:
            small = control_lora.to_file(card.cast(self.low_rank(family)), config)
            place = folder / control_lora.FOLDER / control_lora.file_name(family.version, card.name)
            written.append(save(place, small, self._header(place, card, small)))
        if len(self.decoder):
            tensors, place = card.cast(self.base(family)), folder / "unet"
            header = self._header(place / "weights", card, tensors)
            written.append(save_component(place, public_config(family.denoiser), tensors, header))
        return written

    def _header(self, path: Path, card: Card, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        header = card.header(self.kind, tensors)
        return header | self.retold(path, card) if header else {}

    def retold(self, path: Path, card: Card) -> dict[str, str]:
        """The UNet's folder is a part of a base; factors tell their rank."""
        told = card.metadata.get(self.kind, {}).get("modelspec.architecture")
        if path.parent.name == control_lora.FOLDER:
            own = {control_lora.RANK: str(self.config.rank)}
            ending = "/control-lora"  # as SwarmUI's T2IModelClassSorter calls them
        elif path.parent.name == "unet":
            own, ending = {}, ""
        else:
            return {}
        if told is not None:
            own["modelspec.architecture"] = str(told).removesuffix("/controlnet") + ending
        return own

    def whole(self, family: Family) -> dict[str, Tensor]:
        """The branch's tensors as every tool builds it: factors are added to the base's weights."""
        state = self.branch.state_dict()
        return state if self.config.rank is None else control_lora.whole(state, self.frozen(family))

    def low_rank(self, family: Family) -> dict[str, Tensor]:
        """The branch's factors, the biases beside them, and what is trained whole."""
        biases = {name: t for name, t in self.frozen(family).items() if name.endswith(".bias")}
        return {**self.branch.state_dict(), **biases}

    def frozen(self, family: Family) -> dict[str, Tensor]:
        """The base's tensors beside which the factors are, as its file has them."""
        weights = _weights(family)
        return {name: weights[name] for name in factors.frozen_names(self.branch)}

    def base(self, family: Family) -> dict[str, Tensor]:
        """The UNet's tensors with the trained decoder; the rest as its file has it, not as it is held."""
        return {**_weights(family), **self.decoder.state_dict()}


def _weights(family: Family) -> dict[str, Tensor]:
    """The UNet's tensors as its file has them, not as they are held; of a new one as they are held."""
    folder: Path | None = getattr(family, "folder", None)
    new = getattr(family, "digests", {}).get("unet", "").startswith("new ")
    whole = family.denoiser if folder is None or new else components.load("unet", folder / "unet")
    return whole.state_dict()


def _lite(branch: Any) -> nn.Module:
    """A branch of the same outputs without attention: it sees no text (SDXL's sees the pooled text alone).

    SD 1.5's has 202 million parameters in place of 361, SDXL's 126 in place of 1251; diffusers loads it like
    any other. (In arXiv 2302.05543, section 4.2, ControlNet-lite has one convolution in place of each block.)
    """
    config = dict(branch.config)
    blocks = ["DownBlock2D"] * len(config["block_out_channels"])
    made: nn.Module = type(branch).from_config(
        {**config, "down_block_types": blocks, "mid_block_type": "UNetMidBlock2D"}
    )
    return made


def _draw_outputs(branch: Any) -> None:
    """The 1x1 convolutions where the branch joins the base begin as noise instead of zeros."""
    for layer in (*branch.controlnet_down_blocks, branch.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=GAUSSIAN)


METHOD = ControlNet
