"""The first samples of a run exactly as the model gets them, for people to look at."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from tuner import components
from tuner.batch import Batch
from tuner.check.data import Looked
from tuner.check.part import among, renamed
from tuner.data import encode
from tuner.data.loader import Feed
from tuner.data.plan import Slot
from tuner.family import Family
from tuner.stable_diffusion import StableDiffusion
from tuner.task import Task
from tuner.text import WINDOW

Pixels = npt.NDArray[np.uint8]

THUMBNAIL = 256
"""Longest side of a shown original, in pixels."""
LARGEST = 1024
"""Pictures with a longer side are shown smaller; what the model gets is larger then."""
DRAWS = 3
"""Epochs whose captions are shown of a sample where they differ."""


class Picture(NamedTuple):
    """A picture to be embedded in a page."""

    label: str
    data: str
    width: int
    height: int
    crop: tuple[float, float, float, float] | None = None  # left, top, width, height in percent
    coarse: bool = False  # its pixels are to be seen


class Piece(NamedTuple):
    """A token: its text, whether a word ends with it, and what becomes of it: read, or cut."""

    text: str
    ends: bool
    state: str
    begins: bool = False  # a new window


@dataclass(frozen=True)
class Shown:
    """One sample, ready for the page."""

    name: str
    facts: list[tuple[str, str]]
    pictures: list[Picture]
    caption: str
    trace: list[tuple[str, str]]
    """What each operator left, and first the sample's own captions."""
    draws: list[tuple[str, str]]
    tokens: list[Piece] = field(default_factory=list)
    cut: int = 0


def first(
    task: Task, looked: Looked, accelerator: Accelerator, count: int
) -> tuple[list[Shown], list[tuple[Slot, Batch, int]]]:
    """The first samples of the run, in the order of training.

    The autoencoder is loaded; of the data only these samples are encoded, into the cache.

    Returns:
        What is shown; and for each the slot, the batch that it was taken from and its place there.
    """
    taken = _taken(looked, count)
    family = cast(StableDiffusion, task.family)
    _load_vae(family, accelerator.device)
    # Captions are shown, not their encodings: the text encoders stay without weights.
    asked = replace(looked.asked, text=False)
    feed = encode.feed(among(looked.whole, taken), asked, family)
    shown, batches = [], []
    others = _others(looked, taken)
    for step, slots in renamed(taken).items():
        total = sum(slot.weight for slot in looked.plans[0].step(step))
        batch = feed.batch(slots, total)
        decoded = _decoded(task, batch, accelerator.device)
        for place, (slot, old) in enumerate(zip(slots, taken[step], strict=True)):
            look = _Look(task, feed, batch, place, slot)
            shown.append(
                _shown(look, None if decoded is None else decoded[place], others.get(old.sample, []))
            )
            batches.append((slot, batch, place))
    return shown, batches


def _taken(looked: Looked, count: int) -> dict[int, list[Slot]]:
    """By step the slots that are shown."""
    plan = looked.plans[0]
    taken: dict[int, list[Slot]] = {}
    there, seen, step = len(looked.whole.samples), 0, 0
    while seen < count and step < plan.steps_in(plan.cycle):
        real = [s for s in plan.step(step) if s.weight > 0 and s.sample < there]
        if some := real[: count - seen]:
            taken[step] = some
        seen += len(some)
        step += 1
    return taken


def _load_vae(family: StableDiffusion, device: torch.device) -> None:
    """Put the autoencoder's weights in place of its outline."""
    if "vae" in family.networks:
        own, folder = family.options.vae, family.folder
        assert folder is not None
        place = folder / "vae" if own is None else own
        new = family.digests["vae"].startswith("new ")
        if new:
            network = components.fresh("vae", place, int(family.digests["vae"].rsplit(" ", 1)[1]))
        else:
            network = components.load("vae", place, family.options.dtype("vae"))
        family.networks["vae"] = network.to(device)
        family.freeze()
    family.device = device


def _others(looked: Looked, taken: Mapping[int, Sequence[Slot]]) -> dict[int, list[Slot]]:
    """Where the shown samples come in later epochs, by their number."""
    plan = looked.plans[0]
    wanted = {slot.sample for slots in taken.values() for slot in slots}
    found: dict[int, list[Slot]] = {}
    for epoch in range(1, DRAWS):
        left = set(wanted)
        for step in range(plan.steps_in(epoch), plan.steps_in(epoch + 1)):
            for slot in plan.step(step):
                if slot.sample in left:
                    left.discard(slot.sample)
                    found.setdefault(slot.sample, []).append(slot)
            if not left:
                break
    return found


def _decoded(task: Task, batch: Batch, device: torch.device) -> Tensor | None:
    """What the autoencoder makes of the batch's latents, [B, 3, H, W] in [-1, 1]; None without one."""
    if "vae" not in task.family.modules():
        return None
    with torch.no_grad():
        return task.family.decode_latents(task.latents(batch.to(device))).cpu()


class _Look(NamedTuple):
    """A sample of a batch."""

    task: Task
    feed: Feed
    batch: Batch
    place: int
    slot: Slot


def _shown(look: _Look, decoded: Tensor | None, others: Sequence[Slot]) -> Shown:
    batch, at, slot, feed = look.batch, look.place, look.slot, look.feed
    sample = feed.samples[slot.sample]
    caption = batch.captions[at]
    read, cut = tokens(look.task.family, caption)
    trace = [
        (f"caption {n}" if len(sample.captions) > 1 else "caption", text)
        for n, text in enumerate(sample.captions, 1)
    ]
    if not sample.fixed:
        rule = dict(feed.of_source).get(sample.source, feed.captions)
        trace += rule.trace(sample.captions, feed.views.seed, slot.epoch, slot.position, sample.kinds)
    draws = [(f"epoch {o.epoch + 1}", feed.caption(o._replace(sample=slot.sample))) for o in others]
    return Shown(
        name=batch.names[at],
        facts=_facts(look),
        pictures=_pictures(look, decoded),
        caption=caption,
        trace=trace,
        draws=draws if any(text != caption for _, text in draws) else [],
        tokens=read,
        cut=cut,
    )


def _facts(look: _Look) -> list[tuple[str, str]]:
    batch, at, slot, feed = look.batch, look.place, look.slot, look.feed
    seen = feed.views.seen(slot).picture
    transform = feed.views.transform(slot)
    height, width = seen.shape[:2]
    facts = [
        ("epoch, position", f"{slot.epoch + 1}, {slot.position}"),
        ("file", f"{width}x{height}"),
        ("bucket", f"{transform.width}x{transform.height}"),
        ("scale", f"{transform.scale(height, width):.3g}"),
        ("crop loss", f"{transform.crop_loss(height, width):.1%}"),
        ("mirrored", "yes" if transform.flip else "no"),
        ("weight", f"{float(batch.weight[at]):g} of {batch.total:g} in its step"),
    ]
    if not any(method.WHOLE_STEP for method in look.task.each()):
        t = int(look.task.objective.sample_t(batch.u)[at])
        facts.append(("timestep", f"{t}, drawn from {_timesteps(look.task)}"))
    if batch.sizes is not None:
        told = " ".join(f"{value:g}" for value in batch.sizes[at].tolist())
        facts.append(("told sizes", told))
    return facts


def _timesteps(task: Task) -> str:
    """The first and the last timestep that may be drawn."""
    ends = task.objective.sample_t(torch.tensor([0.0, 1 - 2.0**-24], dtype=torch.float64)).tolist()
    return f"{int(min(ends))} to {int(max(ends))}"


def _pictures(look: _Look, decoded: Tensor | None) -> list[Picture]:
    """The original with its crop, and everything that the model gets of it."""
    batch, at, slot, feed = look.batch, look.place, look.slot, look.feed
    made = [_original(feed, slot)]
    if decoded is not None:
        made.append(embedded("latent, decoded", signed(decoded)))
    elif batch.pixels is not None:
        made.append(embedded("pixels", signed(batch.pixels[at])))
    if batch.condition is not None:
        condition = batch.condition[at]
        made.append(embedded("condition", shares(condition)))
        if (condition < 0).any():
            made.append(embedded("its hole", shares((condition < 0).any(dim=0, keepdim=True).float())))
    if batch.mask is not None:
        mask = batch.mask[at]
        label = f"mask, {float(mask.min()):.3g} to {float(mask.max()):.3g}"
        made.append(embedded(label, shares(mask / mask.max().clamp(min=1e-12)), coarse=True))
    if batch.hole is not None:
        made.append(embedded("hole to be filled", shares(batch.hole[at])))
    return made


def _original(feed: Feed, slot: Slot) -> Picture:
    """A small picture of the file, with the place of the crop."""
    picture = feed.views.seen(slot).picture
    transform = feed.views.transform(slot)
    height, width = picture.shape[:2]
    high, wide, top, left = transform.place(height, width)
    small = Image.fromarray(np.ascontiguousarray(picture))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    crop = tuple(
        round(100 * part / whole, 3)
        for part, whole in ((left, wide), (top, high), (transform.width, wide), (transform.height, high))
    )
    one = embedded("file and crop", np.asarray(small))
    return one._replace(crop=cast(tuple[float, float, float, float], crop))


def signed(pixels: Tensor) -> Pixels:
    """[3, H, W] in [-1, 1] -> uint8 [H, W, 3], rounded; what lies outside is cut off."""
    return shares((pixels.float() + 1) / 2)


def shares(pixels: Tensor) -> Pixels:
    """[1 or 3, H, W] in [0, 1] -> uint8 [H, W] or [H, W, 3], rounded; what lies outside is cut off."""
    values = (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return np.ascontiguousarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))


def embedded(label: str, picture: Pixels, coarse: bool = False) -> Picture:
    """A picture as a PNG within the page."""
    image = Image.fromarray(picture)
    if max(image.size) > LARGEST:
        label += f", shown smaller than its {image.width}x{image.height}"
        image.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    image.save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return Picture(label, f"data:image/png;base64,{text}", image.width, image.height, None, coarse)


def tokens(family: Family, caption: str) -> tuple[list[Piece], int]:
    """A caption's tokens by the first text encoder, those that are cut marked; and how many these are."""
    if not family.text_encoders:
        return [], 0
    tokenizer: Any = next(iter(cast(StableDiffusion, family).tokenizers.values()))
    room = WINDOW - 2
    ids = tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
    reads = room * family.options.windows
    pieces = [
        Piece(
            text.removesuffix("</w>"),
            text.endswith("</w>"),
            "read" if n < reads else "cut",
            n % room == 0 and 0 < n < reads,
        )
        for n, text in enumerate(tokenizer.convert_ids_to_tokens(ids))
    ]
    return pieces, max(0, len(ids) - reads)
