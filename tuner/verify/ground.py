"""What `tuner verify FILE` loads a file onto: a base with its weights, and where asked a run's checkpoint."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import NamedTuple

from tuner import base, checkpoint, optimiser, recipe, rounding
from tuner.checkpoint import State
from tuner.data.cache import Hashes, default_folder
from tuner.ema import Ema
from tuner.errors import UserError
from tuner.family import Family, Options
from tuner.files import bases
from tuner.method import Method
from tuner.objective import Objective
from tuner.recipe import Recipe
from tuner.task import Task

NEEDS = ("unet", "vae", "text_encoder")


class Ground(NamedTuple):
    """A base with its weights in float32.

    Attributes:
        name: as users call it.
        methods: those of a run, as its checkpoint has them; none where no run was named.
        told: what the checkpoint is, in words.
    """

    name: str
    family: Family
    methods: tuple[Method, ...] = ()
    told: str = ""


def has_weights(folder: Path) -> bool:
    """Whether there are weights of a UNet, an autoencoder and a text encoder."""
    try:
        return all(bases.weights_files(folder / name) for name in NEEDS)
    except UserError:
        return False


def of_folder(folder: Path, name: str) -> Ground:
    """A base from its diffusers folder.

    Raises:
        UserError: no family knows it, or it does not load.
    """
    kind = importlib.import_module(f"tuner.families.{base.recognise(folder)}").FAMILY
    family: Family = kind.load(folder, NEEDS)
    family.title, family.digests = name, {}
    return Ground(name, family)


def of_run(run: Path) -> Ground:
    """A run's base, and its methods as the newest checkpoint has them; averages where there are some.

    Raises:
        UserError: there is no recipe or no whole checkpoint in it, or the base does not load.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"--run {run}: there is no recipe.yaml; expected the folder that a run wrote to")
    made = recipe.load(run / "recipe.yaml")
    state = checkpoint.newest(run)
    if state is None:
        raise UserError(f"--run {run}: there is no whole checkpoint in it")
    kinds = {name: importlib.import_module(f"{recipe.METHODS}.{name}").METHOD for name in made.method}
    needs = sorted({*NEEDS, *(need for kind in kinds.values() for need in kind.NEEDS)})
    about, seed = made.base, made.train.seed
    options = Options(
        vae=None if about.vae is None else Path(about.vae), clip_skip=about.clip_skip, windows=about.windows
    )
    hashes = Hashes(default_folder())
    family = base.load(about.path, about.revision, about.new, needs, seed, hashes, options)
    methods = tuple(kind(made.method[name], family, seed) for name, kind in kinds.items())
    _restore(state, made, Task(family, methods, Objective.from_scheduler_config(family.scheduler_config)))
    return Ground(family.title, family, methods, f"the checkpoint of {run.name} at step {state.step:,}")


def _restore(state: State, made: Recipe, task: Task) -> None:
    """What was trained, as exports have it: the averages where the run keeps some; see loop.train's end."""
    if made.train.trained_precision == "bf16":
        rounding.narrow(task.trained())
    trained, saved = checkpoint.read(state, lazy=True)
    task.load_tensors(trained)
    about, methods = made.train, task.each()
    groups = [group for method in methods for group in method.groups(about.learning_rate)]
    built = optimiser.build(groups, **about.optimiser.resolved(), learning_rate=about.learning_rate)
    averaging = optimiser.Averaging(built)
    if about.ema is None and not averaging.kept:
        return
    if about.ema is not None:
        ema = Ema(task.named_trained(), about.ema)
        ema.load_state_dict(saved["ema"])
        ema.keep()
    if averaging.kept:
        built.load_state_dict(saved["optimiser"])
        averaging.keep()
    for method in methods:
        method.after_update()
