"""What a run's passes hold at most, found by running them on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuner import gather, sample
from tuner.batch import Batch
from tuner.data import encode
from tuner.family import Moments
from tuner.memory.live import Live, blocked, nbytes
from tuner.memory.model import META, Model
from tuner.memory.rules import Rules
from tuner.stable_diffusion import DECODED
from tuner.task import Task
from tuner.text import WINDOW, Text, Tokens


@dataclass(frozen=True)
class Pass:
    """What a pass holds besides weights, in bytes.

    Attributes:
        peak: at most, of all that the pass makes.
        gradients: of that, what is left at its end.
    """

    peak: int
    gradients: int = 0


def training(model: Model, pictures: int, side: int) -> Pass:
    """Forward and backward of one micro-batch of so many squares; no bucket is larger than its square."""
    live, rules, accumulating = _live(model), model.rules, model.recipe.train.accumulate > 1
    with live:
        if accumulating:  # the gradients of the passes before
            for parameter in model.trained():
                parameter.grad = torch.empty_like(parameter)
        batch = _batch(model, pictures, *_cropped(model, side))
        with rules:
            rules.forward_pass()
            loss = _loss(model, batch)
        rules.backward_pass()
        loss.backward()  # type: ignore[no-untyped-call]
        del loss, batch
        gradients = nbytes(p.grad for p in model.trained() if p.grad is not None)
    for parameter in model.trained():
        parameter.grad = None
    return Pass(live.peak, gradients)


@torch.no_grad()
def looking(model: Model) -> Pass:
    """The prediction for one picture without gradients, as looks make it; n pictures take n times it."""
    side = model.recipe.data.side
    live = _live(model)
    with live, _rules(model):
        _loss(model, _batch(model, 1, side, side))
    return Pass(live.peak)


@torch.no_grad()
def decoding(model: Model) -> Pass:
    """The autoencoder's way back, for one picture."""
    side = model.recipe.data.side // model.family.factor
    live = _live(model)
    vae: Any = model.family.modules()["vae"]
    with live, _rules(model, exact=True):
        vae.decode(torch.empty(1, model.family.latent_channels, side, side, device=META))
    return Pass(live.peak)


def decoded_together(model: Model, count: int) -> int:
    """How many of so many pictures the autoencoder decodes at once."""
    return min(count, max(1, DECODED // model.recipe.data.side**2))


@torch.no_grad()
def encoding(model: Model) -> Pass:
    """The pictures and captions that are encoded together before the training."""
    family = model.family
    height, width = _cropped(model, max(gather.every_side(model.recipe)))
    peaks = []
    if "vae" in family.modules() and not model.methods[0].WHOLE_STEP:
        live = _live(model)
        with live, _rules(model, exact=True):
            count = encode.pictures_at_once(height, width)
            _encode(model, torch.empty(count, 3, height, width, device=META))
        peaks.append(live.peak)
    if family.text_encoders and all(method.CACHES_TEXT for method in model.methods):
        live = _live(model)
        with live, _rules(model, exact=True):
            family.encode_prompts(_tokens(model, encode.ENCODE_AT_ONCE))
        peaks.append(live.peak)
    return Pass(max(peaks, default=0))


def drawn_together(model: Model, count: int) -> int:
    """How many of so many pictures are drawn at once."""
    return min(count, sample.pictures_at_once(model.recipe.data.side))


def cached(model: Model) -> tuple[bool, bool]:
    """Whether a step reads latents, and text, that were encoded before."""
    about = model.recipe.data
    if about.cache == "off" or any(source.streamed for source in about.source):
        return False, False
    moves = about.crop == "random" or about.jitter is not None or model.family.inpainting
    latents = all(method.CACHES_LATENTS for method in model.methods) and not moves
    return latents, all(method.CACHES_TEXT for method in model.methods)


def _cropped(model: Model, side: int) -> tuple[int, int]:
    """Height and width that the networks see of pictures of a side."""
    whole = model.recipe.method.get("autoencoder")
    crop = getattr(whole, "crop", None)
    side = side if crop is None else min(side, crop)
    return side, side


def _live(model: Model) -> Live:
    return Live(model.tensors(), blocked if model.device == "cpu" else None)


def _rules(model: Model, exact: bool = False) -> Rules:
    return Rules(model.device, torch.float32 if exact else model.dtype)


def _batch(model: Model, pictures: int, height: int, width: int) -> Batch:
    """A batch as the loader makes it."""
    family = model.family
    latents, text = cached(model)
    shape = (pictures, family.latent_channels, height // family.factor, width // family.factor)
    noise, posterior = (torch.empty(shape, device=META) for _ in range(2))
    moments = Moments(torch.empty(shape, device=META), torch.empty(shape, device=META)) if latents else None
    sees = any(method.condition is not None for method in model.methods)
    tokens = _tokens(model, pictures) if family.text_encoders and not text else None

    def picture(channels: int) -> Tensor:
        return torch.empty(pictures, channels, height, width, device=META)

    return Batch(
        names=("",) * pictures,
        captions=("",) * pictures,
        weight=torch.ones(pictures),
        total=float(pictures),
        u=torch.zeros(pictures),
        noise=noise,
        posterior=posterior,
        pixels=None if latents else picture(3),
        moments=moments,
        tokens=tokens,
        text=_text(model, pictures) if family.text_encoders and text else None,
        condition=picture(3) if sees else None,
        sizes=torch.empty(pictures, 6, device=META) if family.told_sizes else None,
        hole=picture(1) if family.inpainting else None,
    )


def _tokens(model: Model, count: int) -> Tokens:
    """Captions for every text encoder."""
    windows = model.recipe.base.windows

    def ids() -> Tensor:
        return torch.empty(count, windows, WINDOW, dtype=torch.int64, device=META)

    ends = torch.empty(count, windows, dtype=torch.int64, device=META)
    second = Tokens(ids(), ends, (0,) * count) if len(model.family.text_encoders) == 2 else None
    return Tokens(ids(), ends, (0,) * count, second)


def _text(model: Model, count: int) -> Text:
    """Captions that were encoded before."""
    with torch.no_grad():
        one = model.family.encode_prompts(_tokens(model, 1))
    return one.map(lambda t: torch.empty(count, *t.shape[1:], dtype=t.dtype, device=META))


def _loss(model: Model, batch: Batch) -> Tensor:
    """The loss of a batch: a number without a value."""
    if "contrastive" in model.recipe.method:
        return _contrast(model, batch)
    if model.methods[0].WHOLE_STEP:
        for method in model.methods:
            method.train_mode(False)  # so that nothing is counted or cropped, which needs numbers
        return model.methods[0].loss(model.family, batch)[0].sum()
    prediction = _predict(model, batch)
    return (prediction.float() - batch.noise).square().mean(dim=(1, 2, 3)).sum()


def _predict(model: Model, batch: Batch) -> Tensor:
    """The prediction [B, C, h, w], by the way that Task goes; times and targets are tiny, and left out."""
    objective: Any = None
    family = model.family
    task = Task(family, model.methods, objective)
    moments = batch.moments
    if moments is None:
        assert batch.pixels is not None
        moments = _encode(model, batch.pixels)
    x_t = moments.sample(batch.posterior) + batch.noise
    concat = None
    if family.inpainting:
        assert batch.pixels is not None and batch.hole is not None
        around = _encode(model, batch.pixels * (batch.hole < 0.5)).mean
        concat = torch.cat([around[:, :1], around], dim=1)
    cond = family.condition(task._text(batch), batch.sizes, concat)
    return task._predict(x_t, torch.empty(len(batch.noise), dtype=torch.int64, device=META), cond, batch)


def _encode(model: Model, pixels: Tensor) -> Moments:
    """As Family.encode_images, whose autocast knows no meta device."""
    vae: Any = model.family.modules()["vae"]
    with torch.no_grad(), _rules(model, exact=True):
        posterior = vae.encode(pixels).latent_dist
        return Moments(posterior.mean * 1.0, posterior.std * 1.0)


def _contrast(model: Model, batch: Batch) -> Tensor:
    """Both encoders' outputs; the loss between them is tiny."""
    networks: Any = model.family.modules()
    assert batch.tokens is not None and batch.pixels is not None
    words = networks["text_encoder"](batch.tokens.ids[:, 0]).last_hidden_state
    looks = networks["image_encoder"](batch.pixels).image_embeds
    total: Tensor = words.float().sum() + looks.float().sum()
    return total
