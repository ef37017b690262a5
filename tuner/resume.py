"""What an output folder that is there already means for a run: skip it, continue it, refuse it, clear it."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tuner import checkpoint, compiling, disk, loop, processes
from tuner import device as machine
from tuner.checkpoint import State
from tuner.errors import UserError
from tuner.gather import LEFT_OUT
from tuner.log import FILE as METRICS
from tuner.progress import say
from tuner.recipe import MAY_CHANGE, Recipe, flatten

DONE = "finished.json"
TOGETHER = "What a run continues from must be seen by all its processes."


def circumstances(recipe: Recipe, accelerator: Accelerator, versions: Mapping[str, str]) -> dict[str, Any]:
    """What a run's bits depend on, too; with another of these it goes on without a promise."""
    device = accelerator.device
    return {
        "code": code_digest(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "deterministic": device.type == "cpu" or recipe.train.deterministic,
        "processes": accelerator.num_processes,
        "accumulate": recipe.train.accumulate,
        "compile": compiling.stated(recipe.train, device.type),
        "sharded": machine.sharding() is not None and accelerator.num_processes > 1,
        **versions,
    }


@functools.cache
def code_digest() -> str:
    """sha256 over the names and the contents of this package's own source files."""
    root, digest = Path(__file__).parent, hashlib.sha256()
    files = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    assert len(files) > 50, f"{root}: too few source files"
    for name in files:
        content = (root / name).read_bytes()
        digest.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def summary(run: loop.Run) -> dict[str, Any]:
    """What a finished run is recognised by: everything its result depends on, and its looks."""
    recipe = {key: value for key, value in run.recipe.resolved().items() if key not in ("log",)}
    fingerprint = {key: value for key, value in run.fingerprint.items() if key not in checkpoint.BESIDES}
    summary = {"steps": run.steps, "fingerprint": fingerprint, "recipe": recipe}
    return dict(json.loads(json.dumps(summary)))


def check_alike(run: loop.Run) -> None:
    """See that all processes would train the same: machines may have folders of one name that differ.

    Raises:
        UserError: on all of them; base, data, versions or code are others.
    """
    made = {key: value for key, value in run.fingerprint["made with"].items() if key != "device"}
    about = {key: value for key, value in run.fingerprint.items() if key not in checkpoint.BESIDES}
    every = processes.everyone(dict(flatten(json.loads(json.dumps({**about, "made with": made})))))
    for rank, other in enumerate(every):
        pairs = {key: (every[0].get(key), other.get(key)) for key in sorted(every[0].keys() | other.keys())}
        lines = [f"  {key}: {one!r} and {two!r}" for key, (one, two) in pairs.items() if one != two]
        if lines:
            told = f"process 0 and process {rank} would train different things:"
            advice = "All machines need the same base, data, versions and code."
            raise UserError("\n".join([told, *lines, advice]))


def finished(run: loop.Run) -> bool:
    """Whether the output holds this run, finished, and no new start is asked for; the first process looks."""
    return processes.as_first(lambda: _finished(run))


def _finished(run: loop.Run) -> bool:
    place = run.output / DONE
    if run.recipe.train.resume == "never" or not place.is_file():
        return False
    try:
        return bool(json.loads(place.read_text(encoding="utf-8")) == summary(run))
    except ValueError:
        say(f"{place}: damaged; the run is finished again from its last checkpoint")
        return False


def start_from(run: loop.Run) -> State | None:
    """The checkpoint that the run continues from, the same on all processes.

    Raises:
        UserError: the output holds another run; not all processes see it.
    """
    return checkpoint.agreed(lambda: _start_from(run))


def _start_from(run: loop.Run) -> State | None:
    asked = run.recipe.train.resume
    if asked == "never":
        return None
    state = checkpoint.newest(run.output) if asked == "auto" else _named(run, Path(asked))
    anew = "Choose another output, or start anew there with train.resume=never."
    if state is None:
        if (run.output / DONE).is_file():
            raise UserError(f"{run.output} holds a finished run without a checkpoint to compare.\n{anew}")
        return None
    found = checkpoint.differences(state, run.fingerprint)
    if state.step > run.steps:
        found.append(f"the checkpoint has {state.step} steps, the run {run.steps}")
    changed = _changed(state, run.recipe)
    if found:
        lines = [f"{state.folder} belongs to another run:", *(f"  {line}" for line in found)]
        lines += [f"Not in the way: {', '.join(changed)}."] if changed else []
        raise UserError("\n".join([*lines, _may_change(), anew]))
    say(f"continuing from {state.folder} ({state.step} of {run.steps} steps are done)")
    if changed:
        say(f"changed since, as may be: {', '.join(changed)}")
    for line in promise(state, run.fingerprint):
        say(line)
    return state


def _may_change() -> str:
    """What a continued run's recipe may have that the checkpoint's has not."""
    keys = ["train.steps and train.epochs (where train.schedule is constant)", *MAY_CHANGE]
    return f"May change: {', '.join(keys)}, and all of preview, validate, evaluate, export, log and output."


def _named(run: loop.Run, asked: Path) -> State:
    """The checkpoint that `train.resume` names, or the one that this very run got to from there.

    So that the same command, given again after a stop, goes on where it was.
    """
    state = checkpoint.newest(asked) if (asked / checkpoint.FOLDER).is_dir() else checkpoint.at(asked)
    if state is None:
        raise UserError(
            f"train.resume: {asked}: no whole checkpoint there; expected the folder of one, as "
            "OUTPUT/checkpoints/step-0000100, or of a run, auto, or never"
        )
    own = checkpoint.newest(run.output)
    if own is not None and own.step > state.step and own.recipe:
        went = own.recipe["train"]["resume"] == run.recipe.train.resume
        if went and not checkpoint.differences(own, run.fingerprint):
            return own
    return state


def _changed(state: State, recipe: Recipe) -> list[str]:
    """The recipe's keys that are others than the checkpoint's although the training is the same."""
    decisive = recipe.decisive()
    old, new = dict(flatten(state.recipe)), dict(flatten(json.loads(json.dumps(recipe.resolved()))))
    if not old:
        return []
    return [
        f"{key} {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in decisive
    ]


def promise(state: State, fingerprint: Mapping[str, Any]) -> list[str]:
    """What is equal to a run that was never stopped: all of it, bit for bit, or why only up to rounding."""
    old, new = ({**f.get("made with", {}), "threads": f["threads"]} for f in (state.fingerprint, fingerprint))
    if new["compile"] == "auto":  # what was decided then is done again
        new["compile"] = old.get("compile")
    reasons = []
    if old.get("code") != new["code"]:
        reasons.append("the code of tuner is another")
    if old.get("device") != new["device"]:
        reasons.append(f"the device was {old.get('device')} and is {new['device']}")
    elif new["device"] == "cpu" and old["threads"] != new["threads"]:
        reasons.append(f"threads were {old['threads']} and are {new['threads']} (train.threads)")
    if not (old.get("deterministic") and new["deterministic"]):
        reasons.append("train.deterministic is not on")
    known = ("code", "device", "deterministic", "processes", "accumulate", "threads")
    for name in sorted(new.keys() - set(known)):
        if old.get(name) != new[name]:
            reasons.append(f"{name} was {old.get(name)} and is {new[name]}")
    divided = [f"{about.get('processes')} x {about.get('accumulate')}" for about in (old, new)]
    if divided[0] != divided[1]:
        reasons.append(
            f"the batch was divided by {divided[0]} (processes x train.accumulate) and is by {divided[1]} "
            "(the same samples with the same noise in the same order; what dropout drops is drawn anew)"
        )
    if not reasons:
        return ["the result will be, bit for bit, that of a run that was not stopped"]
    return [f"equal to a run that was not stopped within rounding, not bit for bit: {'; '.join(reasons)}"]


def clear(output: Path, state: State | None) -> None:
    """Take away what an earlier run left and this one does not continue; in no other folder anything."""
    (output / DONE).unlink(missing_ok=True)
    _sweep(output)
    gone = checkpoint.drop_ahead(output, -1 if state is None else state.step)  # the guard keeps one of step 0
    if gone:
        before = "the run before" if state is None else f"after step {state.step}"
        say(f"{output}: {len(gone)} checkpoint(s) of {before} taken away")
    if state is None and (output / METRICS).is_file():
        (output / LEFT_OUT).unlink(missing_ok=True)
        for name in ("previews", "export", "evaluation", "tensorboard"):
            if (output / name).is_dir():
                shutil.rmtree(output / name)


def _sweep(output: Path) -> None:
    """Take away what was being written when a run was killed; it never came to its place."""
    folders = (output / name for name in ("previews", "export", "evaluation"))
    below = [one for folder in folders for one in folder.rglob(".*.partial")]
    for one in [*output.glob(".*.partial"), *below]:
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)  # it may have been in a folder that is gone by now


def kept(output: Path) -> str:
    """What a run that ended early left, and how it goes on, in a sentence."""
    steps = checkpoint.steps(output)
    state = checkpoint.newest(output) if steps else None
    if state is None:
        return "No checkpoint was written yet; the same command starts again."
    return f"Kept: {state.folder} is whole ({state.step} steps); the same command continues from it."


def check_room(run: loop.Run, state: State | None) -> None:
    """See that checkpoints and exports will fit on the disk, before the first step.

    Raises:
        UserError: they will not; on all processes, of which the first one writes.
    """
    processes.as_first(lambda: _check_room(run, state))


def _check_room(run: loop.Run, state: State | None) -> None:
    one, export = checkpoint_size(run, state), export_size(run)
    asked = run.recipe.train.checkpoint
    written = 1 if asked.every is None else -(-run.steps // asked.every)
    for_good = 0 if asked.keep_every is None else run.steps // asked.keep_every
    # The one that is being written stands beside those that are kept; those that are there take no more.
    copies = min(written, asked.keep + 1 + for_good) - len(checkpoint.steps(run.output))
    needed = max(1, copies) * one + export
    free = disk.free(run.output)
    if free < needed:
        raise UserError(
            f"output: {run.output}: {_size(free)} are free, and about {_size(needed)} are needed: "
            f"{max(1, copies)} checkpoint(s) of {_size(one)} (train.checkpoint.keep: {asked.keep}) and "
            f"exports of {_size(export)}. Make room, or choose another output."
        )


def checkpoint_size(run: loop.Run, state: State | None = None) -> int:
    """Bytes of one checkpoint: as the one there is, or counted from what is trained."""
    if state is not None:
        return sum(file.stat().st_size for file in state.folder.rglob("*") if file.is_file())
    recipe = run.recipe.train
    trained = sum(tensor.numel() * tensor.element_size() for tensor in run.task.tensors().values())
    name = recipe.optimiser.name.lower()
    # float32 numbers for each trained one: two moments, or one; in 8 bits a quarter of them.
    moments = {"sgd": 0.0, "lion": 1.0, "lion8bit": 0.25, "pagedlion8bit": 0.25}.get(name, 2.0)
    moments = 0.5 if name in ("adamw8bit", "pagedadamw8bit") else moments
    numbers = sum(parameter.numel() for parameter in run.task.trained())
    return int(trained + 4 * numbers * (moments + (recipe.ema is not None)))


def export_size(run: loop.Run) -> int:
    """Bytes of the exports at the end, about: each in two layouts; of a full training the whole pipeline."""
    each = {"fp32": 4, "fp16": 2, "bf16": 2}[run.recipe.export.dtype]
    tensors = run.task.tensors().values()
    if "full" in run.recipe.method:
        tensors = [t for module in run.family.modules().values() for t in module.state_dict().values()]  # type: ignore[assignment]
    return 2 * each * sum(tensor.numel() for tensor in tensors)


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
