"""The plan of a run beside what this machine has."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from tuner.device import sharding
from tuner.errors import UserError
from tuner.memory.fitting import fits, lines
from tuner.memory.needs import UNTIL_TRAINED
from tuner.memory.planning import baseline, plan
from tuner.memory.sizes import show
from tuner.progress import say
from tuner.recipe import Recipe

_GROUP = Path("/sys/fs/cgroup")


class Room(NamedTuple):
    """Memory of a device in bytes: what this process could have, and what there is."""

    free: int
    total: int


def available(device: str) -> Room | None:
    """What is free for this process, its own memory included; None where nothing tells.

    On the CPU the machine's memory, or less where a container's limit is lower (cgroup v2).
    """
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return Room(free + torch.cuda.memory_reserved(), total)
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in told if line.endswith("kB")}
    room = Room(sizes["MemAvailable"] + baseline(), sizes["MemTotal"])
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        room = Room(min(room.free, limit - used + baseline()), min(room.total, limit))
    return room


def place_of_proof(recipe: Recipe, accelerator: Accelerator) -> torch.device:
    """Where exports are proved, which takes the base in float32 twice: on the device, or, where a GPU has not
    the room for it, on the CPU."""
    device: torch.device = accelerator.device
    room = available(device.type) if device.type == "cuda" else None
    if room is None or recipe.base.quantise is not None:
        return device
    try:
        needed = plan(recipe, accelerator.num_processes, device.type).proof
    except Exception:  # noqa: BLE001 (as in admit: the device is tried then)
        return device
    if needed <= room.free:
        return device
    say(f"the proof needs about {show(needed)}, and {show(room.free)} are free: on the CPU")
    return torch.device("cpu")


def admit(recipe: Recipe, accelerator: Accelerator) -> None:
    """Say what a run will need; called before the base is loaded.

    Raises:
        UserError: its training needs more than the device has; names settings that would need less.
    """
    device = accelerator.device.type
    room = available(device) if device in ("cpu", "cuda") else None
    if room is None:
        say(f"memory: not planned: nothing tells how much {device} has")
        return
    try:
        needs = plan(recipe, accelerator.num_processes, device)
    except Exception as error:  # noqa: BLE001 (a plan that fails keeps nobody from training)
        say(f"memory: not planned: {' '.join(str(error).split()) or type(error).__name__}")
        return
    local = accelerator.num_processes if device == "cpu" else 1  # that share the machine's memory
    # A GPU's memory is the process's own to use; the machine's others give back what they cache.
    most = room.free if device == "cuda" else room.total
    shared = sharding() is not None and accelerator.num_processes > 1
    if shared:
        say(
            f"memory: FSDP2 shares weights, gradients and the optimiser's state of large networks out among "
            f"{accelerator.num_processes} processes, which is not counted: each holding all would need"
        )
    elif needs.most(UNTIL_TRAINED) * local > most:
        found = fits(recipe, most // local, accelerator.num_processes, device, UNTIL_TRAINED)
        told = "".join(f"\n  {line}" for line in lines(found, most // local))
        raise UserError(f"memory: this run needs about {needs.told()}; {show(most)} are there:{told}")
    line = f"memory: about {needs.told()}, of {show(room.total)}"
    if needs.peak * local > room.free:
        line += f"; only {show(room.free)} are free now: see tuner check"
    say(line)
