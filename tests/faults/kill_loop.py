"""Kill training at random moments, continue, and see whether it ends in the same bytes as a run left alone.

    python tests/faults/kill_loop.py --method lora --kills 25
    python tests/faults/kill_loop.py --method controlnet --kills 10 --processes 2

Each round draws its settings (accumulation, average, caches, workers) and does the same run twice: once
alone, once killed (`kill -9`, the whole process group) several times: while the caches are written, during a
step, in the middle of an accumulation, during a checkpoint, during the export. What is compared is every file
of the export and the trained tensors of the last checkpoint. A tiny random base is made first; the exit code
is 1 if any round differs. Runs are processes of their own, forked off this one after its imports (starts.py).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 24, 4
SAMPLES = 10  # no multiple of the batch
PATIENCE = 300.0  # seconds that one start may take
METHODS = {
    "lora": ("lora.yaml", "style", ["method.lora.dropout=0.1"]),
    "controlnet": ("controlnet_canny.yaml", "train", []),
    "textual_inversion": ("textual_inversion.yaml", "concept", ["method.textual_inversion.init=toy"]),
    "full": ("embedded/4_unet_128.yaml", "train", ["method.full.text_encoder=true"]),
}
SETTINGS = {
    "train.accumulate": ("1", "2"),
    "train.ema": ("null", "0.9"),
    "data.cache": ("on", "off"),
    "data.workers": ("0", "2"),
}


@dataclass(frozen=True)
class Ground:
    """What every run of the loop stands on."""

    method: str
    processes: int
    folder: Path
    starts: Any  # tests/faults/starts.py

    def command(self, output: Path, settings: dict[str, str]) -> list[str]:
        """The arguments of a run."""
        recipe, split, own = METHODS[self.method]
        values = {
            "base": str(self.folder / "base"),
            "data.source": str(self.folder / split),
            "data.heldout": "[]",
            "data.resolution": "64",
            "data.cache": "off" if settings["data.cache"] == "off" else str(output.parent / "cache"),
            "train.steps": str(STEPS),
            "train.batch_size": "4",
            "train.warmup": "2",
            "train.precision": "fp32",
            "train.threads": "1",
            "train.checkpoint.every": str(EVERY),
            "validate.every": "0",
            "preview.every": "0",
            "log.tensorboard": "false",
            "export.name": "killed",
            "output": str(output),
        }
        values |= {key: value for key, value in settings.items() if key != "data.cache"}
        if self.method != "full" and "evaluate.samples" not in settings:
            values["evaluate.samples"] = "0"
        overrides = [f"{key}={value}" for key, value in values.items()]
        return [str(ROOT / "recipes" / recipe), *own, *overrides]


def main() -> int:
    """Parse, loop, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=sorted(METHODS), required=True)
    parser.add_argument("--kills", type=int, default=25, help="how many in all")
    parser.add_argument("--seed", type=int, default=0, help="of the settings and the moments")
    parser.add_argument("--processes", type=int, default=1, help="that train together")
    asked = parser.parse_args()
    if asked.kills < 1 or asked.processes < 1:
        parser.error("--kills and --processes: expected at least 1")
    starts = module("starts", Path(__file__).with_name("starts.py"))
    assert starts.warm() > 100
    with tempfile.TemporaryDirectory(prefix="kill-loop-") as folder:
        ground = Ground(asked.method, asked.processes, Path(folder), starts)
        prepare(ground)
        return loop(ground, asked.kills, random.Random(f"{asked.seed} {asked.method} {asked.processes}"))


def prepare(ground: Ground) -> None:
    """A tiny base and a few scenes."""
    module("models", ROOT / "tests/models.py").tiny_sd1(ground.folder / "base")
    draw = module("shapes_prepare", ROOT / "datasets/shapes/prepare.py").draw
    split = METHODS[ground.method][1]
    (ground.folder / split).mkdir()
    lines = draw(ground.folder / split, split, 0, SAMPLES)
    (ground.folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def module(name: str, place: Path) -> ModuleType:
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(f"tuner_fault_{name}", place)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # where dataclasses look their annotations up
    spec.loader.exec_module(made)
    return made


def loop(ground: Ground, kills: int, chance: random.Random) -> int:
    """Rounds until all kills are spent; prints one line a round."""
    left, rounds, equal = kills, 0, 0
    moments: Counter[str] = Counter()
    while left:
        settings = {key: chance.choice(values) for key, values in SETTINGS.items()}
        place = ground.folder / f"round-{rounds}"
        alone = run_alone(ground, place / "alone", settings)
        seen = run_killed(ground, place / "killed", settings, min(left, chance.randint(3, 6)), chance)
        left_over = contents(place / "killed" / "out")
        other = [n for n in sorted(alone.keys() | left_over.keys()) if alone.get(n) != left_over.get(n)]
        same = not other
        rounds, equal, left = rounds + 1, equal + same, left - len(seen)
        moments.update(seen)
        about = ", ".join(f"{key.split('.')[1]} {value}" for key, value in settings.items())
        print(f"round {rounds}: {about}; killed during {', '.join(seen)}: {'equal' if same else 'DIFFERS'}")
        for name in other:
            print(f"  differs: {name} in {place}")
        sys.stdout.flush()
    during = ", ".join(f"{count} during {name}" for name, count in moments.most_common())
    print(f"{ground.method}, {ground.processes} process(es): {kills} kills ({during});")
    print(f"{equal} of {rounds} runs ended in the same bytes as the run left alone")
    return 0 if equal == rounds else 1


def run_alone(ground: Ground, place: Path, settings: dict[str, str]) -> dict[str, str]:
    """The run without a kill; what it left."""
    code = launch(ground, place, settings).wait(PATIENCE)
    if code:
        sys.exit(f"the run that nothing disturbed ended with {code}:\n{(place / 'printed.txt').read_text()}")
    return contents(place / "out")


def run_killed(
    ground: Ground, place: Path, settings: dict[str, str], kills: int, chance: random.Random
) -> list[str]:
    """Start, kill, start again; at last undisturbed. Returns the moments of the kills that struck.

    Moments are taken in the order in which a run comes to them, so that none is passed before its turn.
    """
    unfit = {"caches"} if settings["data.cache"] == "off" else set()
    unfit |= {ACCUMULATION} if settings["train.accumulate"] == "1" else set()
    names = [name for name in (*MOMENTS, ACCUMULATION) if name not in unfit]
    order = ["caches", ACCUMULATION, *MOMENTS]
    wanted = sorted((chance.choice(names) for _ in range(kills)), key=order.index)
    inside = sorted(chance.randrange(STEPS - 1) for name in wanted if name == ACCUMULATION)
    seen: list[str] = []
    for name in wanted:
        if name == ACCUMULATION:
            hook = [["in_accumulation", inside.pop(0), chance.uniform(0, 0.05)]]
            if launch(ground, place, settings, hook).wait(PATIENCE) == -signal.SIGKILL:
                seen.append(name)
        else:
            ready = MOMENTS[name](place)
            if struck(launch(ground, place, settings), ready, chance):
                seen.append(name)
    code = launch(ground, place, settings).wait(PATIENCE)
    if code:
        sys.exit(f"continuing ended with {code}:\n{(place / 'printed.txt').read_text()}")
    return seen


def launch(ground: Ground, place: Path, settings: dict[str, str], hooks: Sequence[Any] = ()) -> Any:
    """A run in a process group of its own, what it prints beside its output."""
    command = ground.command(place / "out", settings)
    return ground.starts.Start(command, ground.processes, place / "printed.txt", hooks)


def struck(running: Any, ready: Callable[[], float | None], chance: random.Random) -> bool:
    """Kill as soon as the moment has come and a random part of its length is over; False: it ended before."""
    until = time.monotonic() + PATIENCE
    while (length := ready()) is None and running.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    if length is not None:
        time.sleep(chance.uniform(0, length))
    running.send(signal.SIGKILL)
    return bool(running.wait(PATIENCE) == -signal.SIGKILL)


def _caches(place: Path) -> Callable[[], float | None]:
    return _fresh(place / "cache" / "latents", "*", 0.05)


def _step(place: Path) -> Callable[[], float | None]:
    metrics, before = place / "out" / "metrics.jsonl", _size(place / "out" / "metrics.jsonl")

    def ready() -> float | None:
        return 0.5 if _size(metrics) > before else None

    return ready


def _checkpoint(place: Path) -> Callable[[], float | None]:
    return _fresh(place / "out" / "checkpoints", ".step-*.writing", 0.02)


def _export(place: Path) -> Callable[[], float | None]:
    return _fresh(place / "out" / "export", "**/.*.partial", 0.3)


def _fresh(folder: Path, pattern: str, length: float) -> Callable[[], float | None]:
    """Ready as soon as there is something of a name that was not there: kills leave some behind."""

    def there() -> set[tuple[str, int, int]]:
        found = set()
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.add((str(path), about.st_ino, about.st_ctime_ns))
        return found

    before = there()
    return lambda: length if there() - before else None


MOMENTS: dict[str, Callable[[Path], Callable[[], float | None]]] = {
    "caches": _caches,
    "a step": _step,
    "a checkpoint": _checkpoint,
    "the export": _export,
}
"""In the order in which a run comes to them; how long each lasts, in seconds, once it has begun."""
ACCUMULATION = "an accumulation"


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def contents(output: Path) -> dict[str, str]:
    """The hash of everything exported, and of the last checkpoint's trained tensors."""
    files = list(_exported(output)) + [output / f"checkpoints/step-{STEPS:07d}/trained.safetensors"]
    assert len(files) > 1, f"{output} has no export"
    return {str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _exported(output: Path) -> Iterator[Path]:
    return (path for path in sorted((output / "export").rglob("*")) if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
