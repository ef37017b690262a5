"""Trains recipes as one of so many processes; run by test_processes.py.

    python processes.py PROCESSES OUT RECIPE...

Most go through the real build and loop: OUT/NAME.safetensors (the trained tensors) and OUT/NAME.json (what
was divided how, and how many of the base's tensors are what they were) are written of each. Those whose name
begins with `whole` are run as `tuner train` does. Each process writes OUT/NAME-RANK.json: the pictures that
it encoded before training, and what it changed in the run's output.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])  # also where the package is not installed

import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tuner import build, cli, device, loop, memory, processes, recipe  # noqa: E402
from tuner.log import Log  # noqa: E402
from tuner.recipe import Recipe  # noqa: E402
from tuner.signals import Stop  # noqa: E402
from tuner.stable_diffusion import StableDiffusion  # noqa: E402

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
    "shutil.",
)

encoded: list[str] = []
changed: list[str] = []
outputs: list[str] = []


def main(number: int, out: Path, places: list[Path]) -> None:
    """Train each recipe and write what came out."""
    watch()
    for place in places:
        about = recipe.load(place)
        encoded.clear()
        changed.clear()
        outputs[:] = [str(Path(about.output).resolve())]
        if about.name.startswith("whole"):
            assert cli.main(["train", str(place)]) == 0
        else:
            train(about, number, out)
        assert processes.count() == number, processes.count()
        assert torch.distributed.is_initialized() == (number > 1)
        rank = processes.rank()
        (out / f"{about.name}-{rank}.json").write_text(json.dumps({"encoded": encoded, "changed": changed}))


def train(about: Recipe, number: int, out: Path) -> None:
    """Build and train."""
    accelerator = device.start(about.train.precision, about.train.threads)
    assert accelerator.num_processes == number, accelerator.num_processes
    torch.manual_seed(accelerator.process_index)  # processes need not agree in what they do not use
    made = build.build(about, accelerator)
    assert made.division.processes == number and made.division.rank == accelerator.process_index
    trained = {id(parameter) for parameter in made.task.trained()}
    modules = made.family.modules().values()
    frozen = [t for m in modules for t in m.state_dict(keep_vars=True).values() if id(t) not in trained]
    before = [tensor.detach().clone() for tensor in frozen]
    with Log(made.output, False, None, accelerator.is_main_process, None, {}) as log, Stop() as stop:
        assert loop.train(made, log, None, stop)
    if accelerator.is_main_process:
        save_file(
            {n: t.contiguous() for n, t in made.task.tensors().items()}, out / f"{about.name}.safetensors"
        )
        same = sum(torch.equal(now, then) for now, then in zip(frozen, before, strict=True))
        facts = {
            "processes": accelerator.num_processes,
            "accumulate": made.division.accumulate,
            "frozen": len(before),
            "as before": same,
        }
        (out / f"{about.name}.json").write_text(json.dumps(facts))
    accelerator.wait_for_everyone()


def watch() -> None:
    """Write down what is encoded, and every change in the output of the recipe at hand."""
    encode, serialize = StableDiffusion.encode_images, safetensors.torch.serialize_file

    def images(family: StableDiffusion, pixels: torch.Tensor) -> Any:
        encoded.extend(hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in pixels)
        return encode(family, pixels)

    def serialize_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        note("safetensors", path)  # it is no Python that writes
        serialize(tensors, path, *args, **kwargs)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            nameless = flags & os.O_TMPFILE == os.O_TMPFILE  # tuner.disk tries whether it could write
            if flags & WRITES and not nameless:
                note(event, path)
        elif event.startswith(CHANGES):
            for one in arguments[:2]:
                note(event, one)

    memory.admit = lambda recipe, accelerator: None  # planning takes as long as a run
    StableDiffusion.encode_images = images  # type: ignore[method-assign]
    safetensors.torch.serialize_file = serialize_file
    sys.addaudithook(hook)


def note(event: str, path: object) -> None:
    """A change, where it is below the output."""
    if isinstance(path, (str, bytes, os.PathLike)):
        name = os.path.abspath(os.fsdecode(path))
        if any(name == one or name.startswith(f"{one}{os.sep}") for one in outputs):
            changed.append(f"{event} {os.path.relpath(name, outputs[0])}")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
