"""Peaks of real training steps on the CPU beside those that tuner.memory computes.

    python benchmarks/memory.py [--cases "lora;controlnet"] [--full-size] [--json FILE]

Each case runs in a process of its own: the plan in one, the run in another. The run loads the base as
`tuner train` does, makes its methods and optimiser, and takes two optimiser steps on a batch without data
(random latents, encoded captions), through tuner.task.Task. What is measured is the largest resident set that
Linux saw in the two steps (VmHWM of /proc/self/status, set back before them); what is compared with it is the
plan's phase `training`. glibc keeps freed memory that is smaller than its threshold for mappings, and raises
that threshold by itself; here MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ hold it at 64 KiB, so that
what a tensor had goes back to the system.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
RECIPE = """\
base: {base}
method: {method}
data: {{source: none, resolution: {side}}}
train: {{steps: 2, batch_size: {batch}, learning_rate: 1e-4, precision: {precision}, {more}}}
output: none
"""
LORA, WORD = "{lora: {rank: 16}}", "{textual_inversion: {token: <new>, init: random}}"
CASES: dict[str, tuple[str, int, int, str, str]] = {
    "lora 128 px, batch 8": (LORA, 128, 8, "fp32", ""),
    "lora 128 px, batch 32": (LORA, 128, 32, "fp32", ""),
    "lora 256 px, batch 16": (LORA, 256, 16, "fp32", ""),
    "lora 256 px, batch 16, bf16": (LORA, 256, 16, "bf16", ""),
    "lora 256 px, batch 16, checkpointing": (LORA, 256, 16, "fp32", "gradient_checkpointing: true"),
    "textual_inversion 128 px, batch 32": (WORD, 128, 32, "fp32", ""),
    "textual_inversion 256 px, batch 16": (WORD, 256, 16, "fp32", ""),
    "controlnet 128 px, batch 32": ("controlnet", 128, 32, "fp32", ""),
    "controlnet 256 px, batch 16": ("controlnet", 256, 16, "fp32", ""),
    "full 128 px, batch 32": ("{full: {checkpoint_file: false}}", 128, 32, "fp32", ""),
    "full 256 px, batch 16": ("{full: {checkpoint_file: false}}", 256, 16, "fp32", ""),
}
FULL_SIZE = {"lora 512 px, batch 1, SD 1.5 of random weights": (LORA, 512, 1, "fp32", "")}


def recipe_of(case: tuple[str, int, int, str, str], base: str, folder: Path) -> Any:
    """The recipe of a case."""
    from tuner import recipe

    method, side, batch, precision, more = case
    path = folder / "case.yaml"
    text = RECIPE.format(base=base, method=method, side=side, batch=batch, precision=precision, more=more)
    path.write_text(text, encoding="utf-8")
    return recipe.load(path)


def planned(recipe: Any) -> dict[str, Any]:
    """The plan."""
    import time

    from tuner import memory
    from tuner.memory.planning import baseline

    baseline()
    start = time.perf_counter()
    needs = memory.plan(recipe)
    return {"plan": dict(needs.phases)["training"], "seconds": time.perf_counter() - start, **needs.as_json()}


def measured(recipe: Any) -> dict[str, Any]:
    """Two steps of a run."""

    from tuner import build, device, loop

    accelerator = device.start(recipe.train.precision, 1)
    task = build.adapted(recipe, accelerator, build.remembered(recipe))
    if accelerator.mixed_precision != "no":
        task.family.cast(device.DTYPES[accelerator.mixed_precision], task.parameters())
    made = loop.build_optimiser(task.each(), recipe.train)
    prepared, optimiser = accelerator.prepare(task, made)
    batch = batch_of(task, recipe.train.batch_size, recipe.data.resolution)
    for method in task.each():
        method.train_mode(True)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(2):
        loss, _figures = prepared(batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(task.trained(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"measured": peak}


def batch_of(task: Any, count: int, side: int) -> Any:
    """A batch of random numbers; captions are encoded beforehand where the method allows it."""
    import torch

    from tuner.batch import Batch
    from tuner.family import Moments

    family, methods = task.family, task.each()
    words = [name for method in methods for name in getattr(method, "names", [])]
    tokens = family.tokenize([" ".join(["a picture", *words])] * count)
    cached = all(method.CACHES_TEXT for method in methods)
    shape = (count, family.latent_channels, side // family.factor, side // family.factor)
    with torch.no_grad():
        text = task.encode(tokens) if cached else None
    return Batch(
        names=("",) * count,
        captions=("",) * count,
        weight=torch.ones(count),
        total=float(count),
        u=torch.rand(count, dtype=torch.float64),
        noise=torch.randn(shape),
        posterior=torch.randn(shape),
        moments=Moments(torch.randn(shape), torch.rand(shape)),
        tokens=None if cached else tokens,
        text=text,
        condition=torch.rand(count, 3, side, side) if any(m.condition is not None for m in methods) else None,
    )


def in_process(kind: str, name: str, base: str) -> dict[str, Any]:
    """What a process of its own finds."""
    command = [sys.executable, "-W", "ignore", __file__, "--do", kind, "--name", name, "--base", base]
    environment = {**os.environ, **MALLOC, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def random_sd15(folder: Path) -> str:
    """Stable Diffusion 1.5 with random weights, written in float32."""
    import shutil

    from tuner import components, single_file

    source = single_file.CONFIGS / "sd15"
    for name in ("unet", "text_encoder", "vae"):
        components.fresh(name, source / name, 0).save_pretrained(folder / name)  # type: ignore[operator]
    single_file.write_tokenizer(source / "tokenizer", folder / "tokenizer")
    shutil.copytree(source / "scheduler", folder / "scheduler")
    shutil.copy(source / "model_index.json", folder)
    return str(folder)


def main() -> None:
    """Print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="parts of names, between semicolons: the cases to run")
    parser.add_argument("--full-size", action="store_true", help="SD 1.5 too: about 9 GiB, and minutes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--do", choices=["plan", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="embedded", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if arguments.do:
            recipe = recipe_of({**CASES, **FULL_SIZE}[arguments.name], arguments.base, folder)
            print(json.dumps((planned if arguments.do == "plan" else measured)(recipe)))
            return
        words = [word for word in arguments.cases.split(";") if word]
        names = [name for name in CASES if not words or any(word in name for word in words)]
        bases = dict.fromkeys(names, "embedded")
        if arguments.full_size:
            bases |= dict.fromkeys(FULL_SIZE, random_sd15(folder / "sd15"))
        table = []
        for name, base in bases.items():
            found = {"case": name, **in_process("plan", name, base), **in_process("run", name, base)}
            found["ratio"] = found["plan"] / found["measured"]
            table.append(found)
            plan, real = found["plan"] / 2**20, found["measured"] / 2**20
            print(
                f"{name}: planned {plan:.0f} MiB, measured {real:.0f} MiB, ratio {found['ratio']:.3f}",
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(table, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
