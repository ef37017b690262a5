"""Everything a run needs to continue exactly, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tuner.ema import Ema
from tuner.errors import UserError
from tuner.progress import say
from tuner.task import Task

FOLDER = "checkpoints"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Parts:
    """What changes while a run trains. Random state is not among it: it is a function of the step."""

    task: Task
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    ema: Ema | None
    scaler: Any  # torch's gradient scaler under fp16, else None


@dataclass(frozen=True)
class State:
    """A whole checkpoint on disk."""

    folder: Path
    step: int
    fingerprint: dict[str, Any]


def write(
    output: Path, step: int, parts: Parts, fingerprint: Mapping[str, Any], keep: int, accelerator: Accelerator
) -> None:
    """Write OUTPUT/checkpoints/step-N beside, flushed and renamed; keep the newest `keep`."""
    if accelerator.is_main_process:
        root = output / FOLDER
        place = root / f"step-{step:07d}"
        beside = root / f".{place.name}.writing"
        for torn in root.glob(".step-*.writing"):
            shutil.rmtree(torn)
        beside.mkdir(parents=True)
        trained = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.task.tensors().items()}
        save_file(trained, beside / "trained.safetensors")
        torch.save(
            {
                "optimiser": parts.optimiser.state_dict(),
                "schedule": parts.schedule.state_dict(),
                "ema": None if parts.ema is None else parts.ema.state_dict(),
                "scaler": None if parts.scaler is None else parts.scaler.state_dict(),
            },
            beside / "state.pt",
        )
        files = {file.name: _sha256(file) for file in sorted(beside.iterdir())}
        manifest = {"step": step, "fingerprint": dict(fingerprint), "files": files}
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True), encoding="utf-8")
        for file in beside.iterdir():
            _flush(file)
        if place.exists():
            shutil.rmtree(place)
        beside.rename(place)
        _flush(root)
        for old in _folders(output)[keep:]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def drop_ahead(output: Path, step: int) -> None:
    """Remove the checkpoints after a step, before a run goes on from there.

    They are damaged or of an attempt that was given up; among the newest they would crowd out new ones.
    """
    for folder in _folders(output):
        if _step(folder) > step:
            shutil.rmtree(folder)


def newest(output: Path) -> State | None:
    """The newest whole checkpoint of an output folder; damaged ones are named and passed over."""
    folders = _folders(output)
    for folder in folders:
        state = at(folder)
        if state is not None:
            if folder != folders[0]:
                say(f"{folder}: this one, before it, is used")
            return state
    return None


def steps(output: Path) -> list[int]:
    """The steps that an output folder has checkpoints of, in their order, damaged ones too."""
    return sorted(_step(folder) for folder in _folders(output))


def at(folder: Path) -> State | None:
    """The checkpoint in a folder; None, and said, where it is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        damaged = [name for name, digest in manifest["files"].items() if _sha256(folder / name) != digest]
        state = State(folder, int(manifest["step"]), manifest["fingerprint"])
    except (OSError, KeyError, json.JSONDecodeError) as error:
        say(f"{folder}: not a whole checkpoint ({error})")
        return None
    if damaged:
        say(f"{folder}: damaged ({', '.join(damaged)})")
        return None
    return state


def differences(state: State, fingerprint: Mapping[str, Any]) -> list[str]:
    """What stands between a checkpoint and a run that would continue it."""
    old, new = _flat(state.fingerprint), _flat(json.loads(json.dumps(fingerprint)))
    return [
        f"{key}: the checkpoint has {old.get(key)!r}, the run {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The fingerprint by single values; the recipe's have dotted names already."""
    flat: dict[str, Any] = {}
    for name, value in fingerprint.items():
        inner = value if isinstance(value, dict) else {"": value}
        before = "" if name == "recipe" else name
        flat |= {f"{before}.{key}".strip("."): one for key, one in inner.items()}
    return flat


def restore(state: State, parts: Parts) -> int:
    """Put a checkpoint's state into a run's parts; returns the steps done.

    Raises:
        UserError: the checkpoint was made with other options.
    """
    parts.task.load_tensors(load_file(state.folder / "trained.safetensors"))
    saved = torch.load(state.folder / "state.pt", map_location="cpu", weights_only=True)
    for name, part in (("ema", parts.ema), ("scaler", parts.scaler)):
        if (saved[name] is None) != (part is None):
            raise UserError(f"{state.folder}: it was made {'without' if part is not None else 'with'} {name}")
    parts.optimiser.load_state_dict(saved["optimiser"])
    parts.schedule.load_state_dict(saved["schedule"])
    if parts.ema is not None:
        parts.ema.load_state_dict(saved["ema"])
    if parts.scaler is not None:
        parts.scaler.load_state_dict(saved["scaler"])
    return state.step


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
