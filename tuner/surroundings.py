"""What the machine has to give before a run begins: folders of its own, file handles, packages."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from tuner import disk
from tuner.data.cache import default_folder
from tuner.errors import UserError
from tuner.recipe import Recipe

RUNS = ("versions.json", "metrics.jsonl", "checkpoints", "finished.json")
"""Names by which a folder is known to be a run's."""
WRITTEN = ("recipe.yaml", "report.html", "left_out.txt", "export", "previews", "evaluation", "tensorboard")
"""Further names that a run writes, and takes away when it starts anew."""
HANDLES = 64
"""Files that a process has open at a time beside those it began with, about; each worker needs as many."""
PLENTY = 4096
"""Handles that are asked for where the system allows them and fewer are set."""


def check(recipe: Recipe) -> None:
    """See that a run will find what it needs. Nothing is written.

    Raises:
        UserError: the output belongs to something else, the cache cannot be written to, too few files can be
            open, a package that the recipe's log asks for is missing, or torchrun would start a run again
            that does not continue; all that is wrong.
    """
    problems = []
    for look in (_output, _cache, _handles, _packages, _restarts):
        try:
            look(recipe)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _output(recipe: Recipe) -> None:
    """Nothing of the user's may be written over, and no output may be taken for data."""
    output = Path(recipe.output)
    places = [("base.path", recipe.base.path)]
    places += [("data.source", one.path) for one in recipe.data.source]
    places += [("data.heldout", one.path) for one in recipe.data.heldout]
    for key, name in places:
        folder = Path(name)
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            where = "is" if output.resolve() == folder.resolve() else "lies in"
            raise UserError(f"output: {output} {where} the folder of {key}, {name}; choose another folder")
    if not output.is_dir() or any((output / name).exists() for name in RUNS):
        return
    found = [name for name in WRITTEN if (output / name).exists() and not _begun(output / name)]
    if found:
        raise UserError(
            f"output: {output} holds {', '.join(found)}, which a run would write over, but no run; "
            "choose another folder"
        )


def _begun(place: Path) -> bool:
    """Whether it is the recipe of a run that was stopped as it began."""
    if place.name != "recipe.yaml":
        return False
    return place.read_text(encoding="utf-8", errors="replace").startswith("# The recipe ")


def _cache(recipe: Recipe) -> None:
    if recipe.data.cache != "off":
        disk.check_writable(Path(recipe.data.cache or default_folder()), "data.cache")


def _handles(recipe: Recipe) -> None:
    """Raise this process's own limit of open files where it is low; what it may not raise must do."""
    try:
        import resource
    except ImportError:  # a system without such limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workers = recipe.data.workers or 0
    needed = _open() + HANDLES * (1 + workers)
    if soft == resource.RLIM_INFINITY or soft >= max(needed, PLENTY):
        return
    wanted = max(needed, PLENTY) if hard == resource.RLIM_INFINITY else min(max(needed, PLENTY), hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    except (ValueError, OSError):
        wanted = soft
    if wanted < needed:
        fewer = f", or data.workers below {workers}" if workers else ""
        raise UserError(
            f"file handles: {wanted} files may be open at a time, and this run needs about {needed}; "
            f"raise the limit in the shell before the run: ulimit -n {PLENTY}{fewer}"
        )


def _open() -> int:
    """Files that this process has open."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 16


def _packages(recipe: Recipe) -> None:
    asked = {"tensorboard": recipe.log.tensorboard, "wandb": recipe.log.wandb is not None}
    without = {"tensorboard": "false", "wandb": "null"}
    for name in (name for name, wanted in asked.items() if wanted):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"log.{name}: the package {name} is not installed here: pip install {name}, "
                f"or set it to {without[name]}"
            )


def _restarts(recipe: Recipe) -> None:
    """A run that torchrun starts again has to continue, or it would throw its checkpoints away."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and recipe.train.resume == "never":
        raise UserError(
            f"train.resume: found never, but torchrun may start the run again {restarts} times, each time "
            "from the beginning; leave it out (another output starts anew), or start with --max_restarts 0"
        )
