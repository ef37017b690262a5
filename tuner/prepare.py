"""Filling the cache in advance: all that a run encodes before its first step, on any number of processes.

    tuner prepare RECIPE
    accelerate launch --num_processes 4 -m tuner prepare RECIPE

It goes the way that the run itself goes, so that the run finds everything there.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from tuner import build, device, gather, processes
from tuner.data.encode import uncached
from tuner.data.index import UnreadableError
from tuner.data.loader import Feed
from tuner.errors import UserError
from tuner.export.files import write_whole
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.signals import Stop, Stopped

LEFT_OUT = "unreadable.txt"


def prepare(recipe: Recipe) -> int:
    """Encode everything of a recipe that may be cached, and tell what could not be read.

    Returns:
        The exit code: 0, 130 after Ctrl-C, or 1 where another process is gone; what was encoded is kept.

    Raises:
        UserError: nothing may be cached; samples cannot be used, which are listed in OUTPUT/unreadable.txt.
    """
    if recipe.data.cache == "off":
        raise UserError(
            "data.cache: found off, so there is nothing to prepare; name a folder, or leave it out"
        )
    if passing := [source.path for source in recipe.data.source if source.streamed]:
        raise UserError(
            f"there is nothing to prepare: {passing[0]} is read in passing, and encoded in each step; "
            "to have it prepared, download it and give its path, without streaming"
        )
    with Stop() as stop:
        try:
            with stop.at_once():
                _prepare(recipe)
        except (Stopped, KeyboardInterrupt):
            say("stopped; the same command goes on from there")
            return 130 if stop.signal in (None, signal.SIGINT) else 0
        except RuntimeError as error:
            if (reason := processes.lost(error)) is None:
                raise
            told = f"a process is gone, or cannot be reached ({reason}); the same command goes on from there"
            if processes.first(told):
                print(told, file=sys.stderr)
            return 1
    return 0


def _prepare(recipe: Recipe) -> None:
    about = recipe.train
    accelerator = device.start(about.precision, about.threads, about.deterministic)
    task = build.adapted(recipe, accelerator, build.remembered(recipe))
    wanted = gather.wanted(recipe, task, accelerator)
    family = task.family
    encoders = {"pictures": "vae" in family.modules(), "captions": bool(family.text_encoders)}
    anew = uncached(wanted, family)
    if not [what for what, there in encoders.items() if there and what not in anew]:
        reasons = "; ".join(f"{what}: {why}" for what, why in anew.items())
        raise UserError(f"there is nothing to prepare: nothing of this run may be cached ({reasons})")
    listed = Path(recipe.output) / LEFT_OUT
    try:
        gathered = gather.gather(recipe, task, wanted, accelerator)
        heldout = gather.heldout(recipe, task, wanted, accelerator)
    except UnreadableError as error:
        if accelerator.is_main_process:
            _list(listed, error.problems)
        raise UserError(f"{error}\nall of them: {listed}") from error
    if accelerator.is_main_process:
        _list(listed, gathered.feed.left_out)
        for name, feed in (("trained on", gathered.feed), ("held out", heldout)):
            if feed is not None:
                _tell(name, feed)
        say(f"prepared: {wanted.cache}")
    accelerator.wait_for_everyone()


def _list(place: Path, problems: tuple[str, ...]) -> None:
    """Write what could not be read, and why; the list of an earlier time goes where there is nothing."""
    if problems:
        write_whole(place, "\n".join(problems) + "\n")
        say(f"left out: {len(problems)} samples, listed in {place}")
    else:
        place.unlink(missing_ok=True)


def _tell(name: str, feed: Feed) -> None:
    """What of a feed is in the cache."""
    told = [f"{len(feed.samples)} samples {name}"]
    for what, cached in (("pictures", feed.latents), ("captions", feed.texts)):
        if cached.store is not None:
            told.append(f"{cached.entries} {what} encoded")
        else:
            told.append(f"{what} are encoded in each step")
    say("; ".join(told))
