"""Measures a base on the shapes world: autoencoder, and text to image by the exact judge.

    python datasets/shapes/measure.py [BASE] [--samples 200] [--guidance 6] [--steps 25]

BASE is a diffusers folder, by default the base that ships. Prompts are the captions of held-out pictures; a
picture counts as right when every attribute that its prompt names is right. Prints a table and, with --json,
writes the figures.
"""

# ruff: noqa: E402 -- the path must be right before the project's own modules are imported
from __future__ import annotations

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(os.path.dirname(_HERE)), *(p for p in sys.path if os.path.abspath(p) != _HERE)]

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from tuner import attention
from tuner.data.pictures import decode, to_signed
from tuner.data.samples import Sample, Samples
from tuner.data.sources.opening import open_spec
from tuner.data.sources.spec import SourceSpec
from tuner.device import precision, quiet
from tuner.evaluate.captions import Named
from tuner.evaluate.compare import compare, score
from tuner.evaluate.judge import read
from tuner.evaluate.world import Scene
from tuner.sample import to_pictures

ROOT = Path(_HERE).parent.parent
AT_ONCE = 20


@torch.no_grad()
def autoencoder(pipe: StableDiffusionPipeline, samples: Sequence[Sample]) -> dict[str, float]:
    """Round trip: PSNR in dB, mean over pictures; the share of scenes that the judge still reads right."""
    errors, whole = [], []
    for start in range(0, len(samples), AT_ONCE):
        some = samples[start : start + AT_ONCE]
        pixels = torch.from_numpy(np.stack([to_signed(picture_of(s)) for s in some]))
        seen = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        errors += (seen - pixels).square().mean(dim=(1, 2, 3)).tolist()
        whole += [
            compare(read(p), Scene.from_json(scene_of(s)))["all"]
            for p, s in zip(to_pictures(seen), some, strict=True)
        ]
    decibels = 10 * np.log10(4 / np.asarray(errors))
    return {
        "psnr_db": float(decibels.mean()),
        "psnr_db_of_mean_error": 10 * float(np.log10(4 / np.mean(errors))),
        "scenes_read_right": float(np.mean(whole)),
    }


def picture_of(sample: Sample) -> np.ndarray:
    """A sample's picture uint8 [H, W, 3]."""
    return decode(sample.picture.read(), sample.picture.name).picture


def scene_of(sample: Sample) -> dict[str, object]:
    """A sample's scene without its captions."""
    return {key: value for key, value in (sample.scene or {}).items() if key != "captions"}


def prompts(samples: Sequence[Sample], objects: int, count: int) -> list[tuple[str, Named]]:
    """Captions of scenes with so many objects that name all of them; with two, their relation as well."""
    found = []
    for sample in samples:
        scene = sample.scene or {}
        if len(scene["objects"]) != objects:
            continue
        for text, record in zip(sample.captions, scene["captions"], strict=True):
            named = Named.from_json(record["named"])
            asked = all(o.shape not in (None, "thing") and o.colour for o in named.objects)
            if named.whole and asked and (objects == 1 or named.relation):
                found.append((text, named))
                break
    return found[:count]


@torch.no_grad()
def text_to_image(
    pipe: StableDiffusionPipeline,
    wanted: Sequence[tuple[str, Named]],
    guidance: float,
    steps: int,
    half: bool,
) -> tuple[dict[str, float], list[np.ndarray]]:
    """The share of pictures in which each named attribute, and all, are right; picture i has seed i.

    half: the denoiser under bf16 autocast, as it was trained.
    """
    pictures: list[np.ndarray] = []
    for start in range(0, len(wanted), AT_ONCE):
        texts = [text for text, _ in wanted[start : start + AT_ONCE]]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(texts))]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            latents = pipe(
                texts,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=seeds,
                output_type="latent",
            ).images
        pictures += to_pictures(pipe.vae.decode(latents.float() / pipe.vae.config.scaling_factor).sample)
    rows = [score(read(picture), named) for picture, (_, named) in zip(pictures, wanted, strict=True)]
    keys = dict.fromkeys(key for row in rows for key in row)
    shares = {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}
    return {"pictures": len(rows), **shares}, pictures


def opened(folder: Path) -> Samples:
    """The samples of a folder."""
    samples = open_spec(SourceSpec(path=str(folder)))
    assert isinstance(samples, Samples)
    return samples


def main() -> None:
    """Measure and print."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("base", nargs="?", type=Path, default=ROOT / "tuner" / "embedded")
    asked.add_argument("--samples", type=int, default=200)
    asked.add_argument("--guidance", type=float, default=6.0)
    asked.add_argument("--steps", type=int, default=25)
    asked.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    asked.add_argument("--json", type=Path)
    asked.add_argument("--sheet", type=Path, help="write a contact sheet of single-object pictures")
    asked = asked.parse_args()
    quiet()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    splits = {n: opened(Path(_HERE) / n) for n in ("heldout", "combinations", "stars")}
    pipe = StableDiffusionPipeline.from_pretrained(asked.base, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    attention.choose(pipe.unet)
    figures: dict[str, dict[str, float]] = {
        "autoencoder": autoencoder(pipe, splits["heldout"][: asked.samples])
    }
    sets = {
        "one object": prompts(splits["heldout"], 1, asked.samples),
        "two objects": prompts(splits["heldout"], 2, asked.samples),
        "held-out combinations": prompts(splits["combinations"], 1, asked.samples),
        "stars not yellow": prompts(splits["stars"], 1, asked.samples),
    }
    for name, wanted in sets.items():
        figures[name], pictures = text_to_image(
            pipe, wanted, asked.guidance, asked.steps, precision(asked.precision) == "bf16"
        )
        if asked.sheet and name == "one object":
            rows = [
                np.concatenate(pictures[i : i + 8], axis=1)
                for i in range(0, min(64, len(pictures)) // 8 * 8, 8)
            ]
            Image.fromarray(np.concatenate(rows)).save(asked.sheet)
    for name, values in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
