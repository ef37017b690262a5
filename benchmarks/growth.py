"""Whether a run's steps, memory, start and checkpoints stay as they are while its data and its length grow.

    python benchmarks/growth.py [--samples 100 1000 10000 100000] [--steps 100 1000 10000] [--json FILE]

Every run is `tuner train` in a process of its own: a LoRA on the tests' tiny base at 32 px, batch 1, one
thread, fp32, with cached latents and captions. The base is tiny so that what grows is seen: its step takes a
few hundredths of a second, of which the tensors' work is the smaller part, and anything that is done once for
each sample, or again at each step, stands out as it would not beside a large network.

- Data: for each number of samples `tuner prepare` fills the cache, then a run of STEPS steps is measured:
  from the start of its process to the end of its first step, the median step (the first tenth left out), the
  most memory until the last step, and its checkpoints.
- Length: for each number of steps a run on the fewest samples: the median step and the memory in the first
  and in the last tenth, the log's bytes for each step, the checkpoints of its first and of its second half,
  and how long the end takes (export, proof, report).

A step's time is from its beginning to the next one's, so all that the loop does between two is in it; cpu:
the processor's time, which tells whether the machine was quiet. Times are taken in the run's own process, at
the calls of tuner.loop.one_step and tuner.checkpoint.write.
What has to be flat is in LIMITS, with its tolerance; the script ends with 1 where something is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from envelope import RESULTS, write
from tiny import ROOT, base, draw, status

STEPS = 300  # of each run on growing data
TENTH = 10
RECIPE = """\
base: {folder}/base
method: {{lora: {{rank: 4, targets: ['.*attn2.to_v']}}}}
data: {{source: {folder}/{samples}, resolution: 32, cache: {folder}/cache-{samples}, workers: 0}}
train:
  steps: {steps}
  batch_size: 1
  learning_rate: 1e-4
  precision: fp32
  threads: 1
  checkpoint: {{every: {every}}}
log: {{tensorboard: false}}
output: {folder}/output
"""
COLUMNS = {
    "data": "samples prepare_s start_s start_cpu_s step_ms step_cpu_ms peak_mib checkpoint_ms "
    "checkpoint_bytes",
    "length": "steps step_ms step_cpu_ms first_ms last_ms first_mib last_mib log_bytes checkpoint_ms "
    "last_checkpoint_ms end_s",
}


class Limit(NamedTuple):
    """What a figure may be: `times` its reference, and `plus`, and `each` for every sample more.

    The reference is the figure of the smallest run of its kind, or, if given, the same run's figure `of`.
    """

    kind: str
    figure: str
    words: str
    times: float
    plus: float = 0.0
    each: float = 0.0
    of: str | None = None


LIMITS = (
    Limit("data", "step_ms", "median step", 1.1),
    Limit("data", "peak_mib", "most memory", 1.0, 16.0, 2 / 1024),
    Limit("data", "start_s", "start to the end of the first step", 1.1, 0.0, 1e-4),
    Limit("data", "checkpoint_ms", "checkpoint", 1.5, 5.0),
    Limit("data", "checkpoint_bytes", "checkpoint's bytes", 1.01),
    Limit("length", "last_ms", "median step, last tenth to first", 1.1, of="first_ms"),
    Limit("length", "step_ms", "median step", 1.1),
    Limit("length", "last_mib", "memory, last tenth to first", 1.02, of="first_mib"),
    Limit("length", "peak_mib", "most memory", 1.02),
    Limit("length", "log_bytes", "log's bytes for each step", 1.05),
    Limit("length", "last_checkpoint_ms", "checkpoint, last to first", 1.5, 5.0, of="checkpoint_ms"),
    # The guard's memory of losses grows with the first 520 steps (tuner/guard.py), and then no more.
    Limit("length", "checkpoint_bytes", "checkpoint's bytes", 1.01, 8192.0),
)


# ---- in the run's own process


def watched(place: Path, asked: Sequence[str]) -> None:
    """`tuner` with these words; when each step and each checkpoint began and ended is written to `place`."""
    sys.path.pop(0)  # this folder, which no run has there
    from tuner import checkpoint, loop
    from tuner.cli import main as tuner

    steps: list[tuple[float, float, float, float]] = []  # begun, ended, the processor's seconds, MiB
    checkpoints: list[tuple[float, float, int]] = []  # seconds, the most MiB until then, bytes of the log
    one_step, keep = loop.one_step, checkpoint.write

    def step(*asked: Any, **more: Any) -> Any:
        begun = time.monotonic()
        made = one_step(*asked, **more)
        steps.append((begun, time.monotonic(), time.process_time(), status("VmRSS")))
        return made

    def kept(output: Path, *asked: Any, **more: Any) -> Any:
        begun = time.monotonic()
        made = keep(output, *asked, **more)
        seconds = time.monotonic() - begun
        checkpoints.append((seconds, status("VmHWM"), (output / "metrics.jsonl").stat().st_size))
        return made

    loop.one_step, checkpoint.write = step, kept  # type: ignore[assignment]
    sys.argv = ["tuner", *asked]
    code = tuner()
    place.write_text(json.dumps({"steps": steps, "checkpoints": checkpoints}), encoding="utf-8")
    raise SystemExit(code)


# ---- here


def run(folder: Path, command: str, samples: int, steps: int) -> tuple[float, float, dict[str, Any]]:
    """`tuner COMMAND`: when it began and ended, and what it told of itself."""
    recipe, told = folder / "run.yaml", folder / "told.json"
    every = max(1, steps // TENTH)
    recipe.write_text(RECIPE.format(folder=folder, samples=samples, steps=steps, every=every))
    shutil.rmtree(folder / "output", ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    asked = [sys.executable, "-W", "ignore", __file__, "--watched", str(told), command, str(recipe)]
    begun = time.monotonic()
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    ended = time.monotonic()
    if done.returncode:
        raise SystemExit(f"tuner {command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    found: dict[str, Any] = json.loads(told.read_text(encoding="utf-8"))
    return begun, ended, found


def figures(folder: Path, kind: str, samples: int, steps: int) -> dict[str, Any]:
    """A run's row."""
    begun, ended, found = run(folder, "train", samples, steps)
    times, kept = found["steps"], found["checkpoints"]
    kept = kept[-TENTH:]  # the guard's, before the first step, is not one of them
    assert len(times) == steps and len(kept) == TENTH, (len(times), len(kept))
    pairs = list(zip(times, times[1:], strict=False))
    seconds = [1000 * (later[0] - earlier[0]) for earlier, later in pairs]
    processor = [1000 * (later[2] - earlier[2]) for earlier, later in pairs]
    part = steps // TENTH
    newest = folder / "output" / "checkpoints" / f"step-{steps:07d}"
    return {
        "kind": kind,
        "samples": samples,
        "steps": steps,
        "start_s": times[0][1] - begun,
        "start_cpu_s": times[0][2],
        "step_ms": median(seconds[part:]),
        "step_cpu_ms": median(processor[part:]),
        "first_ms": median(seconds[:part]),
        "last_ms": median(seconds[-part:]),
        "first_mib": median(one[3] for one in times[:part]),
        "last_mib": median(one[3] for one in times[-part:]),
        "peak_mib": kept[-1][1],
        "checkpoint_ms": 1000 * median(one[0] for one in kept[: TENTH // 2]),
        "last_checkpoint_ms": 1000 * median(one[0] for one in kept[TENTH // 2 :]),
        "checkpoint_bytes": sum(file.stat().st_size for file in newest.iterdir()),
        "log_bytes": kept[-1][2] / steps,
        "end_s": ended - times[-1][1],
    }


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each limit at each run, with what was found and what may be."""
    verdicts = []
    for limit in LIMITS:
        runs = [row for row in rows if row["kind"] == limit.kind]
        smallest = runs[0]
        for row in runs if limit.of else runs[1:]:
            reference = row[limit.of] if limit.of else smallest[limit.figure]
            more = row["samples"] - smallest["samples"]
            most = limit.times * reference + limit.plus + limit.each * more
            found = row[limit.figure]
            verdicts.append(
                {
                    "kind": "verdict",
                    "of": limit.kind,
                    "samples": row["samples"],
                    "steps": row["steps"],
                    "what": limit.words,
                    "reference": reference,
                    "found": found,
                    "most": most,
                    "flat": bool(found <= most),
                }
            )
    return verdicts


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as Markdown."""
    shown = [[_cell(row[column]) for column in columns] for row in rows]
    lines = [list(columns), ["---"] * len(columns), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return (
        f"{value:,.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def measured(folder: Path, samples: Sequence[int], steps: Sequence[int]) -> list[dict[str, Any]]:
    """All runs, the smallest first."""
    base(folder / "base")
    rows = []
    for count in samples:
        draw(folder / str(count), count)
        begun, ended, _ = run(folder, "prepare", count, STEPS)
        rows.append({**figures(folder, "data", count, STEPS), "prepare_s": ended - begun})
        print(
            f"{count:,} samples: prepared in {ended - begun:.1f} s, {_cell(rows[-1]['step_ms'])} ms",
            flush=True,
        )
    for length in steps:
        rows.append(figures(folder, "length", samples[0], length))
        print(f"{length:,} steps: {_cell(rows[-1]['step_ms'])} ms", flush=True)
    return rows


def main() -> None:
    """Print the tables and write the figures."""
    if sys.argv[1:2] == ["--watched"]:
        watched(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", nargs="+", type=int, default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 1_000, 10_000], help="multiples of 10")
    parser.add_argument("--folder", type=Path, help="keeps the pictures and caches; else a temporary one")
    parser.add_argument("--json", type=Path, default=RESULTS / "growth.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows = measured(folder, sorted(arguments.samples), sorted(arguments.steps))
    verdicts = judged(rows)
    write(arguments.json, "growth", vars(arguments), [*rows, *verdicts])
    for kind in ("data", "length"):
        print("\n" + table([row for row in rows if row["kind"] == kind], COLUMNS[kind].split()))
    print("\n" + table(verdicts, ("of", "samples", "steps", "what", "reference", "found", "most", "flat")))
    if not all(verdict["flat"] for verdict in verdicts):
        raise SystemExit("not flat")


if __name__ == "__main__":
    main()
