"""Whether a recipe, its base and its methods go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from accelerate import Accelerator

from tuner import device, gather, rounding
from tuner.errors import UserError
from tuner.evaluate.measures import measured
from tuner.export import embedding
from tuner.family import Family
from tuner.method import Method
from tuner.recipe import Recipe


def check_quantised(recipe: Recipe, needs: list[str], trained: set[str]) -> None:
    """Raises UserError where a network that is trained itself would be stored quantised."""
    if recipe.base.quantise is None:
        return
    if own := sorted(name for name in trained & set(needs) if name in ("unet", "text_encoder")):
        names = " + ".join(recipe.method)
        raise UserError(
            f"base.quantise: method {names} trains the {' and the '.join(own)} itself, "
            "which must keep its precision; set it to null"
        )


def check_rounded(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises UserError where weights would be held in bfloat16 that cannot be."""
    if recipe.train.trained_precision == "bf16":
        parted = device.sharding() is not None and accelerator.num_processes > 1
        name = recipe.train.optimiser.name
        rounding.check(name, list(recipe.method), str(accelerator.mixed_precision), parted)


def check_size(recipe: Recipe, family: Family) -> None:
    """Raises UserError where the base does not take pictures of this resolution."""
    networks = family.modules()
    if recipe.data.buckets is not None and "image_encoder" in networks:
        raise UserError("data.buckets: the base's image encoder takes squares only; set null")
    for side in gather.every_side(recipe):
        _check_side(side, family, networks)


def _check_side(side: int, family: Family, networks: Mapping[str, Any]) -> None:
    if "vae" in networks and side % family.factor:
        raise UserError(
            f"data.resolution: {side} is no multiple of {family.factor}, the autoencoder's factor"
        )
    if "image_encoder" in networks:
        fixed = int(cast(Any, networks["image_encoder"]).config.image_size)
        if side != fixed:
            raise UserError(
                f"data.resolution: {side}, but the base's image encoder takes {fixed} pixels only"
            )


def check_uses(recipe: Recipe, methods: list[Method]) -> None:
    """Raises UserError where something is asked for that the methods have no use for."""
    names, preview = " + ".join(recipe.method), recipe.preview
    pictures = not any(method.WHOLE_STEP for method in methods)
    problems = []
    if preview.every and not pictures:
        problems.append(f"preview.every: method {names} makes no pictures from prompts; set 0")
    elif preview.every and not recipe.data.heldout:
        if any(method.condition is not None for method in methods):
            problems.append(
                "preview.every: the conditions of previews come from held-out samples: "
                "set data.heldout, or 0 here"
            )
        elif not preview.prompts:
            problems.append("preview.every: there is nothing to show: set preview.prompts or data.heldout")
    if not pictures and recipe.objective.resolved() != type(recipe.objective)().resolved():
        problems.append(f"objective: method {names} has a loss of its own, so these keys have no effect")
    reads = any("text_encoder" in method.NEEDS for method in methods)
    encodes = any("text_encoder" in method.NEEDS and not method.WHOLE_STEP for method in methods)
    defaults = type(recipe.base)(path=recipe.base.path)
    for key in ("clip_skip", "windows"):
        if not encodes and getattr(recipe.base, key) != getattr(defaults, key):
            problems.append(f"base.{key}: method {names} reads no prompt for a denoiser, so it has no effect")
    if not reads and recipe.data.captions != type(recipe.data.captions)():
        problems.append(f"data.captions: method {names} reads no captions, so these keys have no effect")
    if recipe.data.captions.templates and any(method.templates() for method in methods):
        problems.append("data.captions.templates: found together with the method's templates; give one")
    if recipe.train.optimiser.name.lower().endswith("schedulefree") and any(m.SETTLES for m in methods):
        problems.append(
            f"train.optimiser: {recipe.train.optimiser.name} has weights of its own beside the trained ones, "
            f"which method {names} could not keep in place (norm: kept)"
        )
    if {"lora", "textual_inversion"} <= recipe.method.keys():  # they are exported in one file, too
        embedding.check_bundle(word.token for word in cast(Any, recipe.method["textual_inversion"]).words())
    if recipe.export.trigger is not None and not (
        pictures and any(method.kind != "textual_inversion" for method in methods)
    ):
        why = "its words are" if pictures else "it is told no words, so nothing is"
        problems.append(f"export.trigger: method {names}: {why} the trigger; set null")
    if recipe.export.tag_frequency and not any(method.kind == "lora" for method in methods):
        problems.append(f"export.tag_frequency: a LoRA's file tells it, of method {names} none; set false")
    if recipe.evaluate.samples and not (pictures and measured(list(recipe.method))):
        problems.append(f"evaluate.samples: there are no measures for method {names}; set 0")
    if problems:
        raise UserError("\n".join(problems))
