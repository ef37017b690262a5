"""Pictures through the diffusers pipelines that users have: of text, of a picture, or within a mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tuner import samplers
from tuner.errors import UserError
from tuner.family import Family
from tuner.generate.shown import Shown
from tuner.guidance import BOTH, steer
from tuner.progress import track
from tuner.sample import Picture, to_pictures
from tuner.text import Text


@dataclass(frozen=True)
class How:
    """How pictures are drawn.

    Attributes:
        sampler: one of samplers.SAMPLERS.
        steps: sampling steps.
        guidance: scale of classifier-free guidance; 1 is none.
        strength: with a picture to start from, the share of the steps that are done, 0 to 1.
        control: one of guidance.FORMULAS.
        scales: what each ControlNet's residuals are multiplied by.
    """

    sampler: str
    steps: int
    guidance: float
    strength: float = 1.0
    control: str = BOTH
    scales: tuple[float, ...] = ()


class Drawer:
    """A diffusers pipeline around a family's networks, and its arguments besides prompts and seeds."""

    def __init__(self, family: Family, nets: Sequence[nn.Module], shown: Shown, how: How) -> None:
        """
        Args:
            nets: ControlNets, one for each of the shown conditions; they are added up.

        Raises:
            UserError: the sampler is none for this base, or nothing would be drawn.
        """
        assert len(nets) == len(shown.conditions) == len(how.scales)
        self.family, self.shown, self.how = family, shown, how
        self.part = "Img2Img" if shown.image is not None else ""
        if family.inpainting or shown.mask is not None:
            self.part = "Inpaint"
        self.controlled = bool(nets)
        self.pipe = self._pipeline(nets)
        self._check_steps()

    def _pipeline(self, nets: Sequence[nn.Module]) -> Any:
        """The pipeline of this kind around the networks of the family's own."""
        import diffusers
        from diffusers.models import MultiControlNetModel

        own = self.family.pipeline()
        prefix = type(own).__name__.removesuffix("Pipeline").removesuffix("Inpaint")
        kind = getattr(diffusers, f"{prefix}{'ControlNet' * self.controlled}{self.part}Pipeline")
        takes = inspect.signature(kind.__init__).parameters
        given = {**own.config, **own.components, "add_watermarker": False}
        given["scheduler"] = samplers.make(self.how.sampler, self.family.scheduler_config)
        if self.controlled:
            given["controlnet"] = MultiControlNetModel(list(nets)).eval()
            steer(given["controlnet"], self.how.control)
        pipe = kind(**{name: value for name, value in given.items() if name in takes})
        if self.family.inpainting:  # what its denoiser is shown is as in training
            pipe._encode_vae_image = own._encode_vae_image
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _check_steps(self) -> None:
        most = int(self.pipe.scheduler.config.num_train_timesteps)
        if not 1 <= self.how.steps <= most:
            raise UserError(f"--steps {self.how.steps}: expected 1 to {most}")
        if self.part and int(self.how.steps * self.how.strength) < 1:
            raise UserError(
                f"--strength {self.how.strength:g} of --steps {self.how.steps} is less than one step: "
                "nothing would be drawn"
            )

    def predictions(self) -> int:
        """How often the denoiser is called for a picture."""
        self.pipe.scheduler.set_timesteps(self.how.steps)
        skipped = self.how.steps - int(self.how.steps * self.how.strength) if self.part else 0
        return len(self.pipe.scheduler.timesteps) - skipped

    @torch.no_grad()
    def draw(
        self, texts: Sequence[Text], negative: Text, seeds: Sequence[int], tick: Callable[[], object]
    ) -> list[Picture]:
        """One picture uint8 [H, W, 3] for each prompt and seed; it depends on these alone, not on the others.

        Args:
            texts: encoded prompts, each a batch of one.
            negative: the encoded negative prompt, a batch of one.
            tick: called after every prediction.
        """
        count, device = len(texts), self.family.device
        assert count == len(seeds)
        call = self._prompts(texts, negative) | self._pictures(count)

        def done(_: Any, __: int, ___: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
            tick()
            return kept

        latents = self.pipe(
            **call,
            num_inference_steps=self.how.steps,
            guidance_scale=self.how.guidance,
            # On the CPU, so that a seed is the same picture on every device.
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            return_dict=False,
            callback_on_step_end=done,
        )[0]
        return to_pictures(self.family.decode_latents(latents.to(device)))

    def _prompts(self, texts: Sequence[Text], negative: Text) -> dict[str, Tensor]:
        """The encoded prompts as the pipelines take them."""
        told = {
            "prompt_embeds": torch.cat([text.hidden for text in texts]),
            "negative_prompt_embeds": negative.hidden.expand(len(texts), -1, -1),
        }
        pooled = [text.pooled for text in texts if text.pooled is not None]
        if negative.pooled is not None:
            told["pooled_prompt_embeds"] = torch.cat(pooled)
            told["negative_pooled_prompt_embeds"] = negative.pooled.expand(len(texts), -1)
        return told

    def _pictures(self, count: int) -> dict[str, Any]:
        """Size and pictures as the pipelines take them, `count` times."""
        width, height = self.shown.size

        def each(picture: Tensor) -> Tensor:
            return picture.to(self.family.device).expand(count, -1, -1, -1)

        call: dict[str, Any] = {}
        if self.part != "Img2Img" or self.controlled:  # else the picture's own size is taken
            call |= {"height": height, "width": width}
        if self.part:
            grey = torch.full((1, 3, height, width), 0.5)  # to an inpainting base that draws all
            call["image"] = each(grey if self.shown.image is None else self.shown.image)
            call["strength"] = self.how.strength
        if self.part == "Inpaint":
            whole = torch.ones(1, 1, height, width)
            call["mask_image"] = each(whole if self.shown.mask is None else self.shown.mask)
        if self.controlled:
            call["control_image" if self.part else "image"] = [each(c) for c in self.shown.conditions]
            call["controlnet_conditioning_scale"] = list(self.how.scales)
            call["guess_mode"] = self.how.control != BOTH
        return call


def all_of(
    drawer: Drawer, texts: Sequence[Text], negative: Text, seeds: Sequence[int], batch: int
) -> list[Picture]:
    """Draw `batch` pictures at once until all are done, showing progress."""
    parts = [slice(start, start + batch) for start in range(0, len(texts), batch)]
    total = drawer.predictions() * len(parts)
    made: list[Picture] = []
    ticks = cast(Generator[int], track(range(total), total, "drawing", "steps"))
    next(ticks)  # what follows the first is shown as done
    try:
        for part in parts:
            made += drawer.draw(texts[part], negative, seeds[part], lambda: next(ticks, None))
    finally:
        ticks.close()
    return made


def lower(network: nn.Module, dtype: torch.dtype) -> None:
    """Hold a UNet or ControlNet in a lower precision, and let it compute in it.

    What goes around it, the latents above all, stays in float32, as do times and sizes: bfloat16 has no 999.
    """

    def lowered(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [lowered(part) for part in value]
        return value.to(dtype) if isinstance(value, Tensor) else value

    def down(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        named = dict(named)
        for name in _FLOATS & named.keys():
            named[name] = lowered(named[name])
        if told := named.get("added_cond_kwargs"):
            named["added_cond_kwargs"] = {**told, "text_embeds": lowered(told["text_embeds"])}
        return (*map(lowered, args[:1]), *args[1:]), named

    def up(_: nn.Module, __: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        first, *rest = output
        return (first.float() if isinstance(first, Tensor) else first, *rest)

    network.to(dtype)
    network.register_forward_pre_hook(down, with_kwargs=True)
    network.register_forward_hook(up)


_FLOATS = {
    "sample",
    "encoder_hidden_states",
    "controlnet_cond",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
}
