"""Machines, folders and libraries that do not allow what is asked."""

from __future__ import annotations

import builtins
import ctypes
import importlib
import importlib.util
import json
import os
import resource
from collections.abc import Callable
from typing import Any

from .case import Case, World, case, sets

OVERRIDE, SEARCH = 1, 2  # capabilities(7): CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
VERSION = 0x20080522


def obey(world: World) -> None:
    """Let the rights of files count for root too, until the case is over."""
    libc = ctypes.CDLL(None, use_errno=True)
    head, before = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(head, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] &= ~(1 << OVERRIDE | 1 << SEARCH)
    assert libc.capset(head, without) == 0
    world.undo.append(lambda: libc.capset(head, before))


def closed(name: str, mode: int, key: str | None = None, value: Any = None) -> Callable[[World], None]:
    """A folder or file without some rights."""

    def make(world: World) -> None:
        place = world.root / name
        if not place.exists():
            place.mkdir(parents=True)
        old = place.stat().st_mode
        place.chmod(mode)
        world.undo.append(lambda: place.chmod(old))
        if key is not None:
            world.set(key, value)
        obey(world)

    return make


def no_gpu(world: World) -> None:
    import torch

    world.patch.setattr(torch.cuda, "is_available", lambda: False)


def without_gpu(key: str, value: Any) -> Callable[[World], None]:
    return lambda world: (no_gpu(world), world.set(key, value), None)[2]


def library(name: str, error: Exception) -> Callable[[World], None]:
    """It fails to be imported, in this way."""

    def make(world: World) -> None:
        if name == "bitsandbytes":  # peft looks for it by itself, and remembers what it found
            for asks in ("is_bnb_available", "is_bnb_4bit_available"):
                world.patch.setattr(f"peft.tuners.lora.model.{asks}", lambda: False)
        load, built = importlib.import_module, builtins.__import__

        def fail(wanted: str, *rest: Any) -> Any:
            if wanted.partition(".")[0] == name:
                raise error
            return load(wanted, *rest)

        def fail_too(wanted: str, *rest: Any, **more: Any) -> Any:
            if wanted.partition(".")[0] == name:
                raise error
            return built(wanted, *rest, **more)

        world.patch.setattr(importlib, "import_module", fail)
        world.patch.setattr(builtins, "__import__", fail_too)

    return make


def asked(name: str, error: Exception, **values: Any) -> Callable[[World], None]:
    return lambda world: (sets(**values)(world), library(name, error)(world), None)[2]


def locked_recipe(world: World) -> None:
    world.words = ["mine.yaml"]
    world.file("mine.yaml", world.written())
    closed("mine.yaml", 0o000)(world)


def packaged(name: str, **values: Any) -> Callable[[World], None]:
    """A package is asked for that is not installed."""

    def make(world: World) -> None:
        sets(**values)(world)
        find = importlib.util.find_spec
        hide = lambda wanted, *rest: None if wanted == name else find(wanted, *rest)  # noqa: E731
        world.patch.setattr(importlib.util, "find_spec", hide)

    return make


def taken(world: World) -> None:
    world.file("out", "mine")


def below_a_file(world: World) -> None:
    world.file("mine", "mine")
    world.set("output", "mine/out")


def strangers(world: World) -> None:
    """The output is a folder of the user's in which a run's names are taken."""
    world.file("out/recipe.yaml", "base: mine\n")
    world.file("out/notes.txt", "mine")


def another_run(world: World) -> None:
    """The output holds a run of another seed, with a checkpoint."""
    from tuner.cli import main

    world.set("train.checkpoint", {"every": 1})
    world.set("data.cache", "off")
    world.save()
    assert main(["train", "recipe.yaml"]) == 0
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    world.set("train.seed", 7)


def shorter(world: World) -> None:
    another_run(world)
    world.set("train.seed", 0)
    world.set("train.steps", 1)


def without_checkpoint(world: World) -> None:
    world.file("out/finished.json", json.dumps({"steps": 1}))
    world.file("out/metrics.jsonl", "")


def damaged_checkpoint(world: World) -> None:
    place = "run/checkpoints/step-0000001"
    world.file(f"{place}/trained.safetensors", b"")
    manifest = {"step": 1, "fingerprint": {}, "files": {"trained.safetensors": "00"}}
    world.file(f"{place}/manifest.json", json.dumps(manifest))
    world.set("train.resume", place)


def few_handles(world: World) -> None:
    """As few files as this process has open already, and no right to have more."""
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, old[1]))
    world.undo.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, old))

    def refuse(*_: Any) -> None:
        raise ValueError("not allowed to raise maximum limit")

    world.patch.setattr(resource, "setrlimit", refuse)
    world.undo.append(lambda: world.patch.undo())


def into_the_data(world: World) -> None:
    world.set("output", "data")


def into_the_base(world: World) -> None:
    world.own_base()
    world.set("output", "base")


ENVIRONMENT: list[Case] = [
    case("output without right", closed("locked", 0o500, "output", "locked/out"), "output: ", "locked/out",
         "Permission denied; choose another place"),
    case("output's folder without right", closed("locked", 0o500, "output", "locked"), "output: ",
         "locked cannot be written", "Permission denied; choose another place"),
    case("cache without right", closed("locked", 0o500, "data.cache", "locked/cache"), "data.cache: ",
         "Permission denied; choose another place"),
    case("data without right", closed("data/2.png", 0o000), "data/2.png: cannot be read: Permission denied",
         "1 of 4 samples"),
    case("data's folder without right", closed("data", 0o000), "data/",
         "Permission denied: the user of this process needs the right"),
    case("a caption without right", closed("data/2.txt", 0o000), "its caption data/2.txt: cannot be read",
         "Permission denied"),
    case("recipe without right", locked_recipe, "mine.yaml: cannot be read: Permission denied", "mine.yaml"),
    case("base without right", lambda w: (w.own_base(), closed("base/unet/config.json", 0o000)(w)),
         "base/unet/config.json: Permission denied", "the same command starts again"),
    case("output is a file", taken, "output: ", "out is a file", "expected a folder, or nothing yet"),
    case("output below a file", below_a_file, "output: ", "mine is a file", "expected a folder"),
    case("output of the user's", strangers, "output: out holds recipe.yaml", "choose another folder"),
    case("output is the data", into_the_data, "output: data is the folder of data.source", "choose another"),
    case("output is the base", into_the_base, "output: base is the folder of base.path", "choose another"),
    case("output with a zero", sets(output="a\0b"), "output: found a zero character",
         "no name and no text has"),
    case("output with too long a name", sets(output="o" * 300), "File name too long",
         "choose a shorter name"),
    case("another run's output", another_run, "belongs to another run",
         "train.seed: the checkpoint has 0, the run 7", "train.resume=never", lines=12),
    case("a longer run's output", shorter, "belongs to another run", "the checkpoint has 2 steps, the run 1",
         "train.resume=never", lines=12),
    case("a finished run", without_checkpoint, "out holds a finished run without a checkpoint",
         "train.resume=never"),
    case("no checkpoint there", sets(train__resume="gone"), "train.resume: gone: no whole checkpoint there",
         "auto, or never"),
    case("a damaged checkpoint", damaged_checkpoint, "train.resume: run/checkpoints/step-0000001: no whole",
         "auto, or never"),
    case("too few file handles", few_handles, "file handles", "ulimit -n"),
    case("fp16 without a GPU", without_gpu("train.precision", "fp16"), "train.precision: fp16 needs a GPU",
         "bf16, fp32 or auto"),
    case("quantised without bitsandbytes",
         asked("bitsandbytes", ModuleNotFoundError("No module named 'bitsandbytes'"), base__quantise="nf4"),
         "base.quantise: nf4 needs bitsandbytes, which cannot be used here", "No module named",
         "set it to null"),
    case("bfloat16 weights without bfloat16",
         sets(train__trained_precision="bf16", train__precision="fp32"),
         "train.trained_precision: found bf16, but precision is fp32", "expected fp32, or precision bf16"),
    case("bfloat16 weights of an optimiser that sees them all",
         sets(train__trained_precision="bf16", train__precision="bf16", train__optimiser="prodigy"),
         "trained_precision: bf16 needs an optimiser that updates each tensor by itself", "found prodigy"),
    case("bitsandbytes is not there",
         asked("bitsandbytes", ModuleNotFoundError("No module named 'bitsandbytes'"),
         train__optimiser="adamw8bit"),
         "AdamW8bit needs the package bitsandbytes", "No module named", "take adamw"),
    case("bitsandbytes is for another machine",
         asked("bitsandbytes", RuntimeError("CUDA Setup failed"), train__optimiser="lion8bit"),
         "Lion8bit needs the package bitsandbytes", "CUDA Setup failed", "take adamw"),
    case("an optimiser's package",
         asked("prodigyopt", ImportError("no prodigyopt"), train__optimiser="prodigy"),
         "Prodigy needs the package prodigyopt", "tuner[optimisers]"),
    case("wandb is not there", packaged("wandb", log__wandb="mine"),
         "log.wandb: the package wandb is not installed", "pip install wandb, or set it to null"),
    case("tensorboard is not there", packaged("tensorboard", log__tensorboard=True),
         "log.tensorboard: the package tensorboard", "pip install tensorboard, or set it to false"),
]  # fmt: skip
