"""`tuner export`: a run's files once more, from a checkpoint of it; the base is needed, the data is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from tuner import build, checkpoint, device, loop, verify
from tuner import recipe as recipes
from tuner.adapters import exports
from tuner.checkpoint import State
from tuner.ema import Ema
from tuner.errors import UserError
from tuner.export import contents, control_lora, embedding
from tuner.export.identify import ADAPTERS, identify
from tuner.files import account
from tuner.files.convert import FORMS, convert
from tuner.optimiser import Averaging
from tuner.recipe import Recipe
from tuner.task import Task

FREQUENCY = "ss_tag_frequency"
_UIS = ("comfy", "a1111")
_BESIDE: Mapping[str, tuple[str, ...]] = {  # what the exports' subfolders are for
    embedding.FOLDER: _UIS,
    control_lora.FOLDER: _UIS,
    "diffusers": ("diffusers",),
    "lycoris": ("kohya", *_UIS),
    "peft": ("peft", "diffusers"),
    "unet": ("diffusers", "cldm", *_UIS),  # the base's, with the decoder that a ControlNet's needs beside it
}
_OF: Mapping[str, tuple[str, ...]] = {  # what a method is exported as, or converted to
    "lora": ("kohya", "peft", "diffusers", *_UIS),
    "textual_inversion": ("kohya", "diffusers", *_UIS),
    "controlnet": ("diffusers", "cldm", *_UIS),
    "full": ("kohya", "diffusers", "cldm", *_UIS),
}
_ADDITIONS = (embedding.FOLDER, control_lora.FOLDER)  # of which a form may have none


class Wish(NamedTuple):
    """What is asked for; None: as the run itself does it.

    Attributes:
        form: one of FORMS, and only files that are of it.
        dtype: fp16, bf16 or fp32.
        step: the checkpoint's; None: the newest whole one.
        out: the folder that is made; None: one in the run's, whose name says the wish.
    """

    form: str | None = None
    dtype: str | None = None
    step: int | None = None
    out: Path | None = None


def export(run: Path, wish: Wish) -> list[str]:
    """Export the run in the folder `run` again, and prove the files; lines for what was done.

    Without wishes the files are, byte by byte, those that the run exported at that step. They appear
    together, when all are proved. Averages of weights (`train.ema`, schedule-free optimisers) are taken as
    the run does it.

    Raises:
        UserError: no run there, or without such a checkpoint; the base or the recipe is another than it was;
            the folder is there already; a form that there is not of what was trained.
        VerifyError: a file is not what was trained; nothing is left then.
    """
    recipe = _recipe(run, wish.dtype)
    _check_form(recipe, wish.form)
    state = _state(run, wish.step)
    out = _place(run, wish)
    threads = state.fingerprint.get("threads")
    # In float32: nothing that is exported was held in less, and fp16 would ask for a GPU.
    accelerator = device.start("fp32", threads if isinstance(threads, int) else None)
    task, origins = _start(recipe, accelerator)
    _check_same(state, recipe, origins)
    _restore(state, task, recipe)
    digests = {"data": state.fingerprint["data files"], **origins}
    card = build.card(recipe, task, digests, _versions(run), _frequency(run, recipe))
    with _appearing(out) as folder:
        files = task.export(folder, card)
        lines = verify.check(task.family, task.each(), files, card)
        told = dict(zip(files, lines, strict=True))
        if wish.form is not None:
            told = _only(wish.form, told, folder, str(getattr(task.family, "folder", "")))
        count = sum(path.is_file() for path in folder.rglob("*"))
    proofs = [f"verified: {line}" for line in told.values()]
    return [f"step {state.step} of {run} -> {out} ({count} files)", *proofs]


def _recipe(run: Path, dtype: str | None) -> Recipe:
    """The recipe that the run wrote, with another precision of its exports if asked."""
    place = run / "recipe.yaml"
    if not place.is_file():
        what = "is a file" if run.is_file() else "is no run's folder" if run.is_dir() else "does not exist"
        raise UserError(f"{run} {what}; expected the folder that a run wrote to (its recipe's `output`)")
    if dtype is not None and dtype not in device.DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(device.DTYPES)}")
    return recipes.load(place, () if dtype is None else (f"export.dtype={dtype}",))


def _check_form(recipe: Recipe, form: str | None) -> None:
    """Raises UserError for a form that there is not, at all or of what was trained; told before any work."""
    if form is None:
        return
    if form not in FORMS:
        raise UserError(f"--format {form}: expected one of {', '.join(FORMS)}")
    for name in recipe.method:
        if form not in (known := _OF.get(name, ("diffusers",))):
            raise UserError(f"--format {form}: method {name} is exported as {', '.join(known)} only")


def _state(run: Path, step: int | None) -> State:
    """The checkpoint of a step, or the newest whole one."""
    there = checkpoint.steps(run)
    if step is not None and step not in there:
        known = ", ".join(map(str, there)) or "none"
        raise UserError(f"--step {step}: {run} has no checkpoint of it; there are {known}")
    folder = run / checkpoint.FOLDER
    state = checkpoint.newest(run) if step is None else checkpoint.at(folder / f"step-{step:07d}")
    if state is None:
        raise UserError(f"{folder}: there is no whole checkpoint{'' if step is None else f' of step {step}'}")
    return state


def _place(run: Path, wish: Wish) -> Path:
    """The folder that is made."""
    step = None if wish.step is None else f"step-{wish.step}"
    name = "-".join(part for part in ("export-again", step, wish.form, wish.dtype) if part is not None)
    out = run / name if wish.out is None else wish.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already; give another folder by --out, or remove it")
    return out


def _start(recipe: Recipe, accelerator: Accelerator) -> tuple[Task, dict[str, Any]]:
    """The base with the methods as they began, and the digests of the files that this is made of.

    The base is not quantised: no export depends on it.
    """
    hashes = build.remembered(recipe)
    plain = recipe.model_copy(update={"base": recipe.base.model_copy(update={"quantise": None})})
    task = build.adapted(plain, accelerator, hashes)
    return task, build.origins(task, hashes)


def _check_same(state: State, recipe: Recipe, origins: Mapping[str, Any]) -> None:
    """Raises UserError where the recipe, or a file that it names, changed since; new keys are no change."""
    before = state.fingerprint
    own = {key: value for key, value in recipe.decisive().items() if key in before["recipe"]}
    now = {**before, "recipe": own, **{f"{name} files": value for name, value in origins.items()}}
    if found := checkpoint.differences(state, now):
        lines = "".join(f"\n  {line.replace('the run', 'now')}" for line in found)
        raise UserError(f"{state.folder}: what it was trained with has changed since:{lines}")


def _restore(state: State, task: Task, recipe: Recipe) -> None:
    """Put what was trained into the methods as a run exports it: averaged where it is."""
    # Lazily, since most of it, the optimiser's state, is read of a schedule-free one alone.
    trained, saved = checkpoint.read(state, lazy=True)
    task.load_tensors(trained)
    averaged = saved["ema"] is not None
    if averaged:
        assert recipe.train.ema is not None, "the checkpoint's recipe is this one"
        ema = Ema(task.named_trained(), recipe.train.ema)
        ema.load_state_dict(saved["ema"])
        ema.keep()
    elif recipe.train.optimiser.name.lower().endswith("schedulefree"):
        made = loop.build_optimiser(task.each(), recipe.train)
        averaging = Averaging(made)
        made.load_state_dict(saved["optimiser"])
        averaging.keep()
        averaged = True
    for method in task.each():
        method.train_mode(False)
        if averaged:
            method.after_update()


def _versions(run: Path) -> dict[str, str]:
    """The versions that it was trained with, as the run wrote them; the present ones where it did not."""
    place = run / "versions.json"
    if not place.is_file():
        return build.versions()
    return dict(json.loads(place.read_text(encoding="utf-8")))


def _frequency(run: Path, recipe: Recipe) -> dict[str, int] | None:
    """How often each tag is in the captions, as an earlier export of the run tells it."""
    if not recipe.export.tag_frequency:
        return None
    for path in sorted((run / "export").rglob("*.safetensors")):
        if (told := contents.read(path).metadata.get(FREQUENCY)) is not None:
            return dict(next(iter(json.loads(told).values())))
    raise UserError(
        f"export.tag_frequency: no file in {run / 'export'} has it, and captions are not read here; "
        f"set it to false in {run / 'recipe.yaml'}"
    )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside, which gets its name when all is done, and is removed when it is not."""
    beside = out.with_name(f".{out.name}.writing")
    shutil.rmtree(beside, ignore_errors=True)  # of an attempt that was killed
    try:
        yield beside
        if out.is_dir():
            out.rmdir()  # empty, as was looked before
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _only(form: str, told: Mapping[Path, str], folder: Path, base: str) -> dict[Path, str]:
    """Keep what is of one form; what has none of it is converted, as `tuner convert` does it.

    Args:
        told: the exported files with the lines of their proof.
        base: the base's diffusers folder.

    Raises:
        UserError: a part of what was trained has no such form.
    """
    parts: dict[str, list[Path]] = {}
    for path in told:
        place = path.relative_to(folder)
        kind = identify(contents.read(path)).kind
        part = place.parts[0] if place.parts[0] in (*_ADDITIONS, "unet") else "adapter"
        if part == "adapter" and kind not in ADAPTERS:
            part = place.name if kind == "embedding" else "model"
        parts.setdefault(part, []).append(path)
    kept: dict[Path, str] = {}
    for part, paths in parts.items():
        own = {path: told[path] for path in paths if form in _forms(path.relative_to(folder), path)}
        kept |= own if own or part in _ADDITIONS else _converted(form, paths, folder, base)
    stays = {path.relative_to(folder).parts[0] for path in kept}
    for place in folder.iterdir():
        if place.name not in stays:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    return kept


def _forms(place: Path, path: Path) -> tuple[str, ...]:
    """What an exported file is for."""
    if len(place.parts) > 1:
        return _BESIDE[place.parts[0]]
    kind = identify(contents.read(path)).kind
    if kind == "embedding":
        return ("diffusers", "kohya", *_UIS)
    if kind in ADAPTERS:
        return ("kohya", *_UIS)
    return ("cldm", *_UIS) if kind == "ControlNet" else ("kohya", "cldm", *_UIS)


def _converted(form: str, paths: Sequence[Path], folder: Path, base: str) -> dict[Path, str]:
    """One part in a form that the run itself does not write."""
    made = sorted({known for path in paths for known in _forms(path.relative_to(folder), path)})
    if identify(contents.read(paths[0])).kind not in ADAPTERS or form == "cldm":
        raise UserError(f"--format {form}: this run is exported as {', '.join(made)} only")
    target = folder / exports.PEFT
    convert(paths[0], form, target, base)
    (line,) = account.check(target, base, ["diffusers"])
    return {target: line}
