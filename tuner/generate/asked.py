"""What can be asked of `tuner sample`: its options, and the command itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tuner.options import option as _option
from tuner.options import signature

Many = list[str]
BASE, WHAT, HOW, WHERE = "Base", "Adapters and pictures", "Drawing", "Output"


@dataclass(frozen=True)
class Asked:
    """The options as they were given; None where they were not."""

    out: Annotated[Path, _option("--out", "Folder of the pictures.", WHERE)]
    recipe: Annotated[
        Path | None, typer.Argument(metavar="[RECIPE]", help="Its base, size, and preview settings are used.")
    ] = None
    run: Annotated[Path | None, _option("--run", "Folder of a run: its base and what it exported.", BASE)] = (
        None
    )
    base: Annotated[
        str | None,
        _option("--base", "embedded, a diffusers folder, a .safetensors checkpoint, or a Hub id.", BASE),
    ] = None
    revision: Annotated[str | None, _option("--revision", "Branch, tag or commit of a Hub id.", BASE)] = None
    vae: Annotated[Path | None, _option("--vae", "Folder or file of another autoencoder.", BASE)] = None
    clip_skip: Annotated[
        int | None, _option("--clip-skip", "Layer of the text encoders that is read, 1 the last.", BASE)
    ] = None
    windows: Annotated[
        int | None, _option("--windows", "Windows of 75 tokens that a prompt may fill; 1.", BASE)
    ] = None
    prediction: Annotated[
        str | None,
        _option("--prediction", "Of a .safetensors checkpoint: epsilon or v_prediction, if it errs.", BASE),
    ] = None
    precision: Annotated[
        str, _option("--precision", "Of UNet and ControlNets: auto, fp32, bf16 or fp16.", BASE)
    ] = "auto"
    lora: Annotated[
        Many, _option("--lora", "LoRA, DoRA, LoHa, LoKr; may be repeated.", WHAT, "FILE[:WEIGHT]")
    ] = field(default_factory=list)
    embedding: Annotated[
        Many, _option("--embedding", "Vectors of a new word; may be repeated.", WHAT, "FILE")
    ] = field(default_factory=list)
    controlnet: Annotated[
        Many,
        _option(
            "--controlnet",
            "Folder or file, and the condition; may be repeated, all are added. `run` is that of --run.",
            WHAT,
            "NET[:SCALE]:PICTURE",
        ),
    ] = field(default_factory=list)
    image: Annotated[Path | None, _option("--image", "A picture to start from.", WHAT)] = None
    mask: Annotated[Path | None, _option("--mask", "What of it is drawn anew: white.", WHAT)] = None
    prompt: Annotated[Many, _option("--prompt", "May be repeated.", HOW)] = field(default_factory=list)
    negative: Annotated[str | None, _option("--negative", "Negative prompt.", HOW)] = None
    sampler: Annotated[
        str, _option("--sampler", "ddim, pndm, dpm++, dpm++-sde, euler, euler-a or unipc.", HOW)
    ] = "dpm++"
    steps: Annotated[int | None, _option("--steps", "Sampling steps; the recipe's, or 25.", HOW)] = None
    guidance: Annotated[
        float | None, _option("--guidance", "Guidance scale, 1 is none; the recipe's, or 7.", HOW)
    ] = None
    control_guidance: Annotated[
        str | None,
        _option("--control-guidance", "both, conditional, 64/h, 0.825^k or logspace; both.", HOW),
    ] = None
    strength: Annotated[
        float | None, _option("--strength", "How much of --image changes, to 1; 0.6, with --mask 1.", HOW)
    ] = None
    seed: Annotated[int, _option("--seed", "Of a prompt's first picture; the next has the next.", HOW)] = 0
    count: Annotated[int, _option("--count", "Pictures of each prompt.", HOW)] = 1
    batch: Annotated[int, _option("--batch", "Pictures drawn at once.", HOW)] = 1
    size: Annotated[
        str | None, _option("--size", "The image's, the recipe's, or the base's own.", HOW, "WxH")
    ] = None
    grid: Annotated[
        Path | None, _option("--grid", "All in one picture: prompts below, seeds beside one another.", WHERE)
    ] = None


def sample(**given: Any) -> None:
    """Draw pictures from a base with any adapters: from text, from a picture, or within a mask of one."""
    from tuner.generate.make import make

    make(Asked(**given))


sample.__signature__ = signature(Asked)  # type: ignore[attr-defined]
sample.__annotations__ = get_type_hints(Asked, include_extras=True)
