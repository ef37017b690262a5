"""Where the base and the adapters come from: options, a recipe, or the folder of a run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from tuner import base, recipe
from tuner.data.cache import Hashes, default_folder
from tuner.errors import UserError
from tuner.export import contents as reading
from tuner.export.identify import identify
from tuner.family import Family, Options
from tuner.files import bases
from tuner.files.merge import Part, parse
from tuner.generate.asked import Asked
from tuner.objective import Objective
from tuner.recipe import Recipe

NEEDS = ("unet", "vae", "text_encoder")
EXPORT = "export"
TRAINED = "diffusers"  # of EXPORT: a ControlNet, or trained components of the base


@dataclass(frozen=True)
class Source:
    """What pictures are drawn with.

    Attributes:
        path, revision, options: the base, as base.load takes it.
        new, seed: its components that are initialised afresh, and from what; a run has trained them since.
        recipe: whose preview settings and size are used, if there is one.
        trained: the run's own noise schedule and prediction are used: its base is.
        own: components of the base that the run trained.
        replaced: folders of those of them that the base's folder does not hold.
        loras, embeddings: adapter files.
        net: the run's ControlNet.
    """

    path: str
    options: Options
    revision: str | None = None
    new: tuple[str, ...] = ()
    seed: int = 0
    recipe: Recipe | None = None
    trained: bool = False
    own: tuple[str, ...] = ()
    replaced: tuple[Path, ...] = ()
    loras: tuple[Part, ...] = ()
    embeddings: tuple[Path, ...] = ()
    net: Path | None = None


def find(asked: Asked) -> Source:
    """What was asked for, with what a run exported before what the options name.

    Raises:
        UserError: no base is named, or two are; the run's folder lacks something.
    """
    if asked.recipe is not None and (other := "--run" if asked.run else "--base" if asked.base else None):
        raise UserError(f"RECIPE {asked.recipe} has no effect beside {other}; give one of them")
    found: Source
    if asked.run is not None:
        found = _of_run(asked.run)
        if asked.base is not None:  # the run's adapters on another base
            if found.own:
                raise UserError(f"--base {asked.base} has no effect: {asked.run} trained the base itself")
            about = Options(clip_skip=found.options.clip_skip, windows=found.options.windows)
            found = replace(found, path=asked.base, options=about, revision=None, new=(), trained=False)
    elif asked.recipe is not None:
        found = _of_recipe(recipe.load(asked.recipe))
    elif asked.base is not None:
        found = Source(asked.base, Options())
    else:
        raise UserError("there is no base: give --base, a recipe, or --run")
    options = found.options
    return replace(
        found,
        revision=asked.revision or found.revision,
        options=replace(
            options,
            vae=asked.vae or options.vae,
            clip_skip=asked.clip_skip or options.clip_skip,
            windows=asked.windows or options.windows,
            prediction=cast(Any, asked.prediction) or options.prediction,
        ),
        loras=(*found.loras, *map(parse, asked.lora)),
        embeddings=(*found.embeddings, *map(Path, asked.embedding)),
    )


def load(source: Source) -> Family:
    """The base, with what the run trained of it, in float32 on the CPU.

    Raises:
        UserError: it does not load.
    """
    hashes = Hashes(default_folder())
    family = base.load(source.path, source.revision, source.new, NEEDS, source.seed, hashes, source.options)
    for place in source.replaced:
        _replace(family, place)
    if source.trained:
        assert source.recipe is not None
        if source.own:  # a pipeline's folder has a name that says nothing
            family.title = base.title_of(source.recipe.base.path)
        chosen = source.recipe.objective.options()
        try:
            objective = Objective.from_scheduler_config(family.scheduler_config, **chosen)
        except ValueError as error:
            raise UserError(f"objective: {error}") from error
        family.scheduler_config = objective.sampling(family.scheduler_config)
    return family


def _of_recipe(made: Recipe) -> Source:
    about = made.base
    options = Options(
        vae=None if about.vae is None else Path(about.vae),
        clip_skip=about.clip_skip,
        windows=about.windows,
        prediction=about.prediction,
    )
    return Source(about.path, options, about.revision, tuple(about.new), made.train.seed, made)


def _of_run(output: Path) -> Source:
    """The base of a run's recipe, and the files in its export folder."""
    told, export = output / "recipe.yaml", output / EXPORT
    if not told.is_file() or not export.is_dir():
        missing = "recipe.yaml" if not told.is_file() else f"folder {EXPORT}"
        raise UserError(f"--run {output}: there is no {missing} in it; expected the folder of a finished run")
    made = recipe.load(told)
    found = replace(_of_recipe(made), trained=True)
    for name in made.method:
        kind = importlib.import_module(f"{recipe.METHODS}.{name}").METHOD
        if kind.kind == "lora":
            file = _lora(export, made.name)
            found = replace(found, loras=(*found.loras, Part(file, 1.0)))
        elif kind.kind == "textual_inversion":
            found = replace(found, embeddings=(*found.embeddings, *_embeddings(export)))
        elif kind.kind == "controlnet":
            found = replace(found, net=_there(export / TRAINED / "config.json").parent)
            if (export / "unet" / "config.json").is_file():  # its decoder was unlocked
                found = replace(found, own=("unet",), replaced=(export / "unet",))
        else:
            found = _with_components(found, export, _trained(kind.exact(made.method[name]), export))
    return found


def _lora(export: Path, name: str) -> Path:
    """The adapter's file; LoHa and LoKr lie apart, as not every tool reads them."""
    apart = export / "lycoris" / f"{name}.safetensors"
    return apart if apart.is_file() else _there(export / f"{name}.safetensors")


def _trained(kinds: Sequence[str], export: Path) -> tuple[str, ...]:
    """The components that a run trained, `text_encoder` standing for all of them."""
    encoders = sorted(place.name for place in (export / TRAINED).glob("text_encoder*") if place.is_dir())
    every = (encoders if kind == "text_encoder" else [kind] for kind in kinds)
    return tuple(name for names in every for name in names)


def _there(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; is the run finished?")
    return file


def _embeddings(export: Path) -> list[Path]:
    """The files of words; a LoRA that bundles them is none."""
    files = sorted(export.glob("*.safetensors"))
    words = [file for file in files if identify(reading.read(file)).kind == "embedding"]
    if not words:
        raise UserError(f"{export}: there are no vectors of a word; is the run finished?")
    return words


def _with_components(found: Source, export: Path, trained: Sequence[str]) -> Source:
    """The components of the base that were trained, in place of those they were made from."""
    whole = export / TRAINED
    if (whole / "model_index.json").is_file():  # the base itself need not be there any more
        options = replace(found.options, vae=None, prediction=None)
        return replace(found, path=str(whole), revision=None, new=(), options=options, own=tuple(trained))
    places = {name: _there(whole / name / "config.json").parent for name in trained}
    if strange := [name for name in trained if name.removesuffix("_2") not in NEEDS]:
        raise UserError(f"{export}: the run trained the {', '.join(strange)}, which draws no pictures")
    vae = places.pop("vae", found.options.vae)  # its scaling factor is in its config.json
    new = tuple(name for name in found.new if name not in trained or name != "vae")
    options = replace(found.options, vae=vae)
    return replace(found, options=options, new=new, own=tuple(trained), replaced=tuple(places.values()))


def _replace(family: Family, place: Path) -> None:
    """Give a component the weights in a folder."""
    network: Any = family.modules()[place.name]
    try:
        network.load_state_dict(bases.weights(place))
    except RuntimeError as error:
        raise UserError(f"{place}: does not fit the base: {error}") from error
