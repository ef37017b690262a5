"""Everything a run needs to continue exactly, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner import processes, shard_files
from tuner.disk import DiskError, writing
from tuner.ema import Ema
from tuner.errors import UserError
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.task import Task
from tuner.training import Checkpoint

FOLDER = "checkpoints"
MANIFEST, TRAINED, STATE = "manifest.json", "trained.safetensors", "state.pt"
BESIDES = ("threads", "made with")
"""Of a fingerprint: what may change, and leaves equality bit for bit without a promise."""


@dataclass(frozen=True)
class Parts:
    """What changes while a run trains. Random state is not among it: it is a function of the step."""

    task: Task
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    ema: Ema | None
    scaler: Any  # torch's gradient scaler under fp16, else None
    guard: Any = None  # what the divergence guard remembers (guard.Watch), None: nothing


@dataclass(frozen=True)
class State:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    fingerprint: dict[str, Any]
    recipe: dict[str, Any]  # all of it; empty in checkpoints of earlier code


@processes.patient()
def write(
    output: Path,
    step: int,
    parts: Parts,
    fingerprint: Mapping[str, Any],
    recipe: Recipe,
    accelerator: Accelerator,
) -> None:
    """Write OUTPUT/checkpoints/step-N beside, flushed and renamed; take away old ones as the recipe says.

    The main process does it alone, but for what is parted among the processes: each of them writes its part.

    Raises:
        DiskError: it cannot be written; the checkpoints before it are as they were.
    """
    root = output / FOLDER
    place = root / f"step-{step:07d}"
    beside = root / f".{place.name}.writing"
    trained, state = _contents(parts)
    parted = shard_files.take(trained, state)
    about = {"step": step, "fingerprint": dict(fingerprint), "recipe": recipe.resolved()}

    def finish() -> None:
        _fill(beside, place, trained, state)
        _complete(beside, place, about)
        with writing(root):
            for old in _old(output, recipe.train.checkpoint):
                shutil.rmtree(old)

    steps = [lambda: _begin(place, beside), finish]
    try:
        if parted:
            _agreed(steps[:1], accelerator)
            _agreed([lambda: shard_files.write(beside / shard_files.FOLDER, parted)], accelerator, every=True)
            _agreed(steps[1:], accelerator)
        else:
            _agreed(steps, accelerator)
    except UserError:
        if accelerator.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)  # half of it helps nobody and takes room
        raise


def _agreed(steps: Sequence[Callable[[], None]], accelerator: Accelerator, every: bool = False) -> None:
    """Do what the main process has to do, or every one; where it fails on one of them, it fails on all.

    Raises:
        DiskError: on the process that could not write.
        UserError: on the others.
    """
    failed: UserError | None = None
    if every or accelerator.is_main_process:
        try:
            for step in steps:
                step()
        except DiskError as error:
            failed = error
    if accelerator.num_processes > 1:  # none waits for one that has ended
        count = torch.tensor(0 if failed is None else 1, device=accelerator.device)
        if bool(accelerator.reduce(count, "sum")):
            who = "a process" if every else "the main process"
            failed = failed or UserError(f"{who} could not write the checkpoint")
    if failed is not None:
        raise failed


def _begin(place: Path, beside: Path) -> None:
    """An empty folder beside the place, and nothing of earlier attempts."""
    root = place.parent
    _recover(root)
    with writing(place):
        for torn in root.glob(".step-*.writing"):
            shutil.rmtree(torn)
        beside.mkdir(parents=True)


def _complete(beside: Path, place: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of the files in `beside`, flush them, and put the folder in its place."""
    root = place.parent
    files = {file.relative_to(beside).as_posix(): _sha256(file) for file in _files(beside)}
    manifest = json.loads(json.dumps({**about, "written": int(time.time()), "files": files}))
    text = json.dumps({**manifest, "digest": _digest(manifest)}, indent=2, sort_keys=True)
    with writing(place / MANIFEST):
        (beside / MANIFEST).write_text(text, encoding="utf-8")
    with writing(place):
        for file in [*_files(beside), *(one for one in beside.iterdir() if one.is_dir())]:
            _flush(file)
        _flush(beside)
        aside = root / f".{place.name}.old"
        if place.exists():
            place.rename(aside)
        beside.rename(place)
        _flush(root)
        shutil.rmtree(aside, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _recover(root: Path) -> None:
    """Put back a checkpoint that was moved aside for a new one which did not come to its place."""
    for aside in root.glob(".step-*.old"):
        place = root / aside.name[1:].removesuffix(".old")
        if place.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another process did it
                aside.rename(place)


def _contents(parts: Parts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds: the trained tensors, and the state of everything else."""
    optimiser = parts.optimiser.state_dict()
    kept = {number: dict(one) if isinstance(one, dict) else one for number, one in optimiser["state"].items()}
    return parts.task.tensors(), {
        "optimiser": {**optimiser, "state": kept},
        "schedule": parts.schedule.state_dict(),
        "ema": None if parts.ema is None else parts.ema.state_dict(),
        "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
        "guard": None if parts.guard is None else parts.guard.state_dict(),
    }


def _fill(folder: Path, place: Path, trained: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """The files of a checkpoint into `folder`, which becomes `place`."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}
    with writing(place / TRAINED):
        save_file(whole, folder / TRAINED)
    # Through a file of Python's own: torch's says less of what went wrong.
    with writing(place / STATE), (folder / STATE).open("wb") as file:
        torch.save(dict(state), file)


def _old(output: Path, asked: Checkpoint) -> Iterator[Path]:
    """The checkpoints that need not be kept."""
    for number, folder in enumerate(_folders(output)):
        step = _step(folder)
        if number < asked.keep or (step and asked.keep_every and step % asked.keep_every == 0):
            continue
        if asked.keep_hours is not None and time.time() - _written(folder) < 3600 * asked.keep_hours:
            continue
        yield folder


def _written(folder: Path) -> float:
    """When a checkpoint was written, by its own word: files' times change when they are copied."""
    try:
        return float(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["written"])
    except (OSError, KeyError, TypeError, ValueError):
        return 0.0


def drop_ahead(output: Path, step: int) -> list[Path]:
    """Remove the checkpoints after a step, before a run goes on from there; returns which.

    They are damaged or of an attempt that was given up; among the newest they would crowd out new ones.
    """
    ahead = [folder for folder in _folders(output) if _step(folder) > step]
    for folder in ahead:
        shutil.rmtree(folder)
    return ahead


def newest(output: Path) -> State | None:
    """The newest whole checkpoint of an output folder; damaged ones are named and passed over."""
    _recover(output / FOLDER)
    folders = _folders(output)
    for folder in folders:
        state = at(folder)
        if state is not None:
            if folder != folders[0]:
                say(f"{folder}: this one, before it, is used")
            return state
    return None


def agreed(find: Callable[[], State | None]) -> State | None:
    """The checkpoint that the first process finds, which all others then see, too; all have to call it.

    Raises:
        UserError: on all of them, where some do not see it, or `find` raises one.
    """
    state = processes.as_first(find)
    seen = processes.everyone(state is None or processes.until(lambda: at(state.folder) == state))
    if state is not None and not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise UserError(
            f"{state.folder}: process 0 would continue from it, and of {len(seen)} processes these see none, "
            f"or another: {blind}. The output must lie on a file system that all machines share: put it "
            "there, checkpoints too, or start on the machine alone that has them."
        )
    return state


def steps(output: Path) -> list[int]:
    """The steps that an output folder has checkpoints of, in their order, damaged ones too."""
    return sorted(_step(folder) for folder in _folders(output))


def at(folder: Path) -> State | None:
    """The checkpoint in a folder; None, and said, where it is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, fingerprint, recipe = manifest["files"], manifest["fingerprint"], manifest.get("recipe", {})
        if not _is_manifest(manifest):
            raise ValueError(f"{MANIFEST} was changed")
        damaged = [name for name, digest in files.items() if _sha256(folder / name) != digest]
        state = State(folder, int(manifest["step"]), fingerprint, recipe)
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        say(f"{folder}: not a whole checkpoint ({error})")
        return None
    if damaged:
        say(f"{folder}: damaged ({', '.join(damaged)})")
        return None
    return state


def _is_manifest(found: dict[str, Any]) -> bool:
    """Whether a manifest is what was written; those of earlier code have no digest of their own."""
    parted = {name for name in found["files"] if name.startswith(f"{shard_files.FOLDER}/")}
    if found["files"].keys() - parted != {TRAINED, STATE}:
        return False
    if "digest" not in found:
        return found.keys() == {"step", "fingerprint", "files"}
    return bool(_digest({key: value for key, value in found.items() if key != "digest"}) == found["digest"])


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def differences(state: State, fingerprint: Mapping[str, Any]) -> list[str]:
    """What stands between a checkpoint and a run that would continue it; not what BESIDES names."""
    old, new = _flat(state.fingerprint), _flat(json.loads(json.dumps(fingerprint)))
    return [
        f"{key}: the checkpoint has {old.get(key)!r}, the run {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in BESIDES
    ]


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint by single values; the recipe's have dotted names already."""
    flat: dict[str, Any] = {}
    for name, value in fingerprint.items():
        inner = value if isinstance(value, dict) else {"": value}
        before = "" if name == "recipe" else name
        flat |= {f"{before}.{key}".strip("."): one for key, one in inner.items()}
    return flat


def read(
    state: State, alike: Mapping[str, Tensor] | None = None, lazy: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a checkpoint holds: the trained tensors by name, and the state of everything else.

    Nothing in it is run: state.pt may hold tensors and plain values only (torch's `weights_only`).

    Args:
        alike: tensors of the run that continues it, which come parted where these are (shard_files.read).
        lazy: what is in state.pt is read where it is looked at.

    Raises:
        UserError: it holds what is no state.
    """
    try:
        saved = torch.load(state.folder / STATE, map_location="cpu", weights_only=True, mmap=lazy)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{state.folder / STATE}: no state of a run: {str(error).splitlines()[0]}") from error
    trained = load_file(state.folder / TRAINED)
    parted = state.folder / shard_files.FOLDER
    if parted.is_dir():
        shard_files.put(shard_files.read(parted, alike or {}), trained, saved)
    return trained, saved


def restore(state: State, parts: Parts) -> int:
    """Put a checkpoint's state into a run's parts, also one that parts its networks otherwise.

    Returns:
        The steps done.

    Raises:
        UserError: the checkpoint was made with other options, or holds what is no state.
    """
    trained, saved = read(state, (alike := _alike(parts)))
    for name, part in (("ema", parts.ema), ("scaler", parts.scaler)):
        if (saved[name] is None) != (part is None):
            raise UserError(f"{state.folder}: it was made {'without' if part is not None else 'with'} {name}")
    shard_files.part(alike, trained, saved)
    parts.task.load_tensors(trained)
    parts.optimiser.load_state_dict(saved["optimiser"])
    parts.schedule.load_state_dict(saved["schedule"])
    if parts.ema is not None:
        parts.ema.load_state_dict(saved["ema"])
    if parts.scaler is not None:
        parts.scaler.load_state_dict(saved["scaler"])
    if parts.guard is not None and saved.get("guard") is not None:
        parts.guard.load_state_dict(saved["guard"])
    return state.step


def _alike(parts: Parts) -> dict[str, Tensor]:
    """The trained tensors by the names that shard_files gives them and what belongs to each."""
    named = parts.task.tensors()
    found = {f"{place}/{name}": tensor for name, tensor in named.items() for place in ("trained", "ema")}
    ordered = [parameter for group in parts.optimiser.param_groups for parameter in group["params"]]
    return found | {f"optimiser.{number}/": parameter for number, parameter in enumerate(ordered)}


def _folders(output: Path) -> list[Path]:
    """The checkpoint folders, newest step first."""
    found = [p for p in (output / FOLDER).glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
