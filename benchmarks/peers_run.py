"""One run of benchmarks/peers.py in a process of its own: a peer's script or ours, timed at each step.

peers_run.py theirs|ours FIGURES BEGAN STEPS SCRIPT ARGUMENTS...
peers_run.py loss RECIPE
"""

from __future__ import annotations

import json
import re
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """When each step was done, and what the last one found."""

    def __init__(self, figures: Path, began: float, steps: int) -> None:
        self.figures, self.began, self.steps = figures, began, steps
        self.walls: list[float] = []
        self.cpus: list[float] = []

    def step(self) -> None:
        """A step is done."""
        self.walls.append(time.time())
        self.cpus.append(time.process_time())
        if len(self.walls) == self.steps:
            self.write()

    def write(self) -> None:
        """The figures up to the last step."""
        import torch
        from accelerate.state import AcceleratorState

        # Of all that is trained on, the first fifth (caches, warm-up) is not in the steady part.
        start = self.steps // 5
        between = self.steps - 1 - start
        gpu = torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
        found: dict[str, Any] = {
            "to_first_step": self.walls[0] - self.began,
            "to_last_step": self.walls[-1] - self.began,
            "steps_per_second": between / (self.walls[-1] - self.walls[start]),
            "cpu_per_step": (self.cpus[-1] - self.cpus[start]) / between,
            "cpu_seconds": self.cpus[-1],
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "threads": torch.get_num_threads(),
            "precision": AcceleratorState().mixed_precision.replace("no", "fp32"),
        }
        if gpu is not None:
            found["peak_gpu_mib"] = gpu
        self.figures.write_text(json.dumps(found))


def theirs(clock: Clock) -> None:
    """Time a script by its progress bar, the one of a known length that it calls Steps."""
    _torchvision()
    import tqdm.auto

    class Bar(tqdm.auto.tqdm):  # type: ignore[misc,type-arg]
        """The scripts' own bar; each update is a step."""

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if str(self.desc).startswith("Steps"):
                clock.step()
            return bool(shown)

    tqdm.auto.tqdm = Bar  # type: ignore[misc]


def _torchvision() -> None:
    """Import it; a build for another torch looks up operators that no script uses: these are declared."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    globals()["_library"] = library  # it lives as long as this
    for _ in range(20):
        try:
            import torchvision  # noqa: F401
        except ImportError as error:
            raise SystemExit(f"the scripts need torchvision: {error}") from error
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing.group(1)}(Tensor a) -> Tensor")
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return
    raise SystemExit("this torchvision does not go with this torch")


def ours(clock: Clock) -> None:
    """Time our run by its progress bar."""
    sys.path.insert(0, str(ROOT))
    from tuner.progress import Progress

    shown = Progress.update

    def update(self: Progress, step: int, loss: float, images: int) -> None:
        shown(self, step, loss, images)
        clock.step()

    Progress.update = update  # type: ignore[method-assign]


def loss(path: Path) -> float:
    """The validation loss of a recipe before its first step."""
    sys.path.insert(0, str(ROOT))
    from tuner import build, device, loop, recipe

    asked = recipe.load(path)
    run = build.build(asked, device.start("fp32", None))
    assert run.heldout is not None
    for method in run.methods:
        method.train_mode(False)
    return loop.validate(run, run.heldout)


def main() -> None:
    side, *rest = sys.argv[1:]
    if side == "loss":
        print(loss(Path(rest[0])))
        return
    figures, began, steps, script, *arguments = rest
    clock = Clock(Path(figures), float(began), int(steps))
    {"theirs": theirs, "ours": ours}[side](clock)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
