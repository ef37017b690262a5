"""Memory of real training steps on the CPU beside what tuner.memory computes, and its plans for full-size
bases.

    python benchmarks/memory.py [--cases "lora;controlnet"] [--full-size] [--plans] [--json FILE]

Each case runs in a process of its own: the plan in one, the run in another. The run loads the base as
`tuner train` does, makes its methods and optimiser, and takes two optimiser steps on a batch without data
(random latents, encoded captions), through tuner.task.Task. What is measured is the largest resident set that
Linux saw in the two steps (VmHWM of /proc/self/status, set back before them); what is compared with it is the
plan's phase `training`. glibc keeps freed memory that is smaller than its threshold for mappings, and raises
that threshold by itself; here MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ hold it at 64 KiB, so that
what a tensor had goes back to the system.

The parts are counted, too: bytes of the networks' tensors (a quantised weight with its scales), of what is
trained beside them, of gradients, of the optimiser's state, and of the networks that a GPU run would set
aside while it trains; each beside the plan's.

--plans is a table of plans alone, on the meta device: GiB on a GPU in the training phase of Stable Diffusion
1.5 (512 px) and XL (1024 px), everything cached, by method, batch and path to less memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from envelope import write

ROOT = Path(__file__).resolve().parents[1]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
RECIPE = """\
base: {{path: {base}{held}}}
method: {method}
data: {{source: none, resolution: {side}}}
train: {{steps: 2, batch_size: {batch}, learning_rate: 1e-4, precision: {precision}{train}}}
output: none
"""
LORA, WORD = "{lora: {rank: 16}}", "{textual_inversion: {token: <new>, init: random}}"
BRANCH, FULL = "controlnet", "{full: {checkpoint_file: false}}"
EIGHT, AGAIN = ", optimiser: adamw8bit", ", gradient_checkpointing: true"
ROUNDED = ", trained_precision: bf16"


class Case(NamedTuple):
    """A run: its method, pictures and precision, and further keys of `train` and `base`."""

    method: str
    side: int
    batch: int
    precision: str = "fp32"
    train: str = ""
    base: str = ""


CASES: dict[str, Case] = {
    "lora 128 px, batch 8": Case(LORA, 128, 8),
    "lora 128 px, batch 32": Case(LORA, 128, 32),
    "lora 256 px, batch 16": Case(LORA, 256, 16),
    "lora 256 px, batch 16, bf16": Case(LORA, 256, 16, "bf16"),
    "lora 256 px, batch 16, checkpointing": Case(LORA, 256, 16, train=AGAIN),
    "lora 128 px, batch 8, bf16": Case(LORA, 128, 8, "bf16"),
    "lora 128 px, batch 8, bf16, nf4": Case(LORA, 128, 8, "bf16", base="nf4"),
    "lora 128 px, batch 8, bf16, int8": Case(LORA, 128, 8, "bf16", base="int8"),
    "textual_inversion 128 px, batch 32": Case(WORD, 128, 32),
    "textual_inversion 256 px, batch 16": Case(WORD, 256, 16),
    "textual_inversion 128 px, batch 8, bf16, nf4": Case(WORD, 128, 8, "bf16", base="nf4"),
    "controlnet 128 px, batch 32": Case(BRANCH, 128, 32),
    "controlnet 256 px, batch 16": Case(BRANCH, 256, 16),
    "controlnet 128 px, batch 8, bf16": Case(BRANCH, 128, 8, "bf16"),
    "controlnet 128 px, batch 8, bf16, nf4": Case(BRANCH, 128, 8, "bf16", base="nf4"),
    "controlnet 128 px, batch 8, bf16, weights in bf16, adamw8bit": Case(
        BRANCH, 128, 8, "bf16", ROUNDED + EIGHT
    ),
    "full 128 px, batch 32": Case(FULL, 128, 32),
    "full 256 px, batch 16": Case(FULL, 256, 16),
    "full 128 px, batch 8, bf16": Case(FULL, 128, 8, "bf16"),
    "full 128 px, batch 8, bf16, adamw8bit": Case(FULL, 128, 8, "bf16", EIGHT),
    "full 128 px, batch 8, bf16, weights in bf16": Case(FULL, 128, 8, "bf16", ROUNDED),
    "full 128 px, batch 8, bf16, weights in bf16, adamw8bit": Case(FULL, 128, 8, "bf16", ROUNDED + EIGHT),
    "full 128 px, batch 8, bf16, all of these, checkpointing": Case(
        FULL, 128, 8, "bf16", ROUNDED + EIGHT + AGAIN
    ),
}
FULL_SIZE = {"lora 512 px, batch 1, SD 1.5 of random weights": Case(LORA, 512, 1)}
FROZEN = {"bf16": ("", ""), "int8": ("", "int8"), "nf4": ("", "nf4")}
BOTH = {"nf4, checkpointing": (AGAIN, "nf4")}
TRAINED = {
    "adamw8bit": (EIGHT, ""),
    "weights in bf16": (ROUNDED, ""),
    "weights in bf16, adamw8bit": (ROUNDED + EIGHT, ""),
}
PATHS: dict[str, tuple[str, dict[str, tuple[str, str]]]] = {
    "lora": (LORA, {**FROZEN, "checkpointing": (AGAIN, ""), **BOTH}),
    "textual_inversion": (WORD, {**FROZEN, "checkpointing": (AGAIN, ""), **BOTH}),
    "controlnet": (
        BRANCH,
        {**FROZEN, **TRAINED, "checkpointing": (AGAIN, ""), "all": (ROUNDED + EIGHT + AGAIN, "nf4")},
    ),
    "full": (
        FULL,
        {"bf16": ("", ""), **TRAINED, "checkpointing": (AGAIN, ""), "all": (ROUNDED + EIGHT + AGAIN, "")},
    ),
}
BASES = {"sd15": 512, "sdxl": 1024}
BATCHES = (1, 4)


def recipe_of(case: Case, base: str, folder: Path) -> Any:
    """The recipe of a case."""
    from tuner import recipe

    path = folder / "case.yaml"
    held = f", quantise: {case.base}" if case.base else ""
    path.write_text(RECIPE.format(**{**case._asdict(), "base": base, "held": held}), encoding="utf-8")
    return recipe.load(path)


def planned(recipe: Any) -> dict[str, Any]:
    """The plan."""
    import time

    from tuner import memory
    from tuner.memory.planning import baseline

    baseline()
    start = time.perf_counter()
    needs = memory.plan(recipe)
    seconds = time.perf_counter() - start
    aside = memory.plan(recipe, 1, "cuda").aside
    return {
        "plan": dict(needs.phases)["training"],
        "seconds": seconds,
        "aside_on_gpu": aside,
        **needs.as_json(),
    }


def measured(recipe: Any) -> dict[str, Any]:
    """Two steps of a run: the peak, and its parts."""
    from tuner import build, device, loop
    from tuner.memory.live import nbytes

    accelerator = device.start(recipe.train.precision, 1)
    task = build.adapted(recipe, accelerator, build.remembered(recipe))
    if accelerator.mixed_precision != "no":
        kept = task.parameters() if recipe.train.trained_precision == "fp32" else ()
        task.family.cast(device.DTYPES[accelerator.mixed_precision], kept)
    made = loop.build_optimiser(task.each(), recipe.train)
    prepared, optimiser = accelerator.prepare(task, made)
    batch = batch_of(task, recipe.train.batch_size, recipe.data.resolution)
    for method in task.each():
        method.train_mode(True)
    parts: dict[str, int] = {}
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for _ in range(2):
        loss, _figures = prepared(batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(task.trained(), 1.0)
        parts["gradients"] = nbytes(p.grad for p in task.trained())
        optimiser.step()
        optimiser.zero_grad()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return {"measured": peak, "parts": {**parts, **held(task, made)}}


def held(task: Any, optimiser: Any) -> dict[str, int]:
    """Bytes of what lies in memory between two steps, as the plan names it."""
    import torch

    from tuner.adapters.layers import path_of
    from tuner.memory.live import nbytes

    networks = task.family.modules()
    own = {
        name: [t for path, t in net.named_parameters() if path_of(path) is None]
        for name, net in networks.items()
    }
    every = {id(p) for tensors in own.values() for p in tensors}
    sizes = {
        name: nbytes([*own[name], *net.buffers(), *[t for layer in net.modules() for t in scales(layer)]])
        for name, net in networks.items()
    }
    states = [t for kept in optimiser.state.values() for n, t in kept.items() if not n.startswith("qmap")]
    cached = ["vae"] + list(task.family.text_encoders) * all(method.CACHES_TEXT for method in task.each())
    frozen = [name for name in cached if not any(p.requires_grad for p in networks[name].parameters())]
    return {
        "weights": sum(sizes.values()),
        "trained": nbytes(p for p in task.trained() if id(p) not in every),
        "optimiser": nbytes(t for t in states if isinstance(t, torch.Tensor)),
        "aside": sum(sizes[name] for name in frozen),
    }


def scales(layer: Any) -> list[Any]:
    """What belongs to a quantised layer's weight."""
    from tuner import quantised

    if not quantised.is_quantised(layer):
        return []
    about = getattr(layer.weight, "quant_state", None)
    if about is None:
        return [layer.state.SCB]
    return [about.absmax, about.code, about.offset, about.state2.absmax, about.state2.code]


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


def beside(found: dict[str, Any]) -> dict[str, Any]:
    """A row: the peaks and their ratio, and each part planned and counted."""
    counted = found["parts"]
    wanted = {name: found[name] for name in ("trained", "gradients", "optimiser")}
    wanted |= {"weights": sum(found["weights"].values()), "aside": found["aside_on_gpu"]}
    parts = {name: {"planned": wanted[name], "counted": counted[name]} for name in sorted(counted)}
    return {
        "case": found["case"],
        "planned": found["plan"],
        "measured": found["measured"],
        "ratio": found["plan"] / found["measured"],
        "seconds": found["seconds"],
        "parts": parts,
    }


def compared(names: list[str], full_size: bool, folder: Path) -> list[dict[str, Any]]:
    """Runs beside their plans."""
    bases = dict.fromkeys(names, "embedded")
    if full_size:
        bases |= dict.fromkeys(FULL_SIZE, random_sd15(folder / "sd15"))
    table = []
    for name, base in bases.items():
        row = beside({"case": name, **in_process("plan", name, base), **in_process("run", name, base)})
        table.append(row)
        parts = ", ".join(
            f"{part} {one['planned'] / 2**20:.2f}/{one['counted'] / 2**20:.2f}"
            for part, one in row["parts"].items()
        )
        plan, real = row["planned"] / 2**20, row["measured"] / 2**20
        print(
            f"{name} ({parts} MiB): planned {plan:.0f} MiB, measured {real:.0f} MiB, "
            f"ratio {row['ratio']:.3f}",
            flush=True,
        )
    return table


def plans(folder: Path, bases: list[str]) -> list[dict[str, Any]]:
    """What full-size bases need on a GPU, by path and batch."""
    from tuner import memory, single_file
    from tuner.memory.planning import Passes

    table = []
    for base in bases:
        for method, (block, paths) in PATHS.items():
            passes = Passes()
            for path, (train, stored) in paths.items():
                row: dict[str, Any] = {"base": base, "method": method, "path": path}
                for batch in BATCHES:
                    case = Case(block, BASES[base], batch, "bf16", train, stored)
                    recipe = recipe_of(case, str(single_file.CONFIGS / base), folder)
                    needs = memory.plan(recipe, 1, "cuda", passes)
                    row[f"batch {batch}"] = dict(needs.phases)["training"]
                    row["aside"] = needs.aside
                table.append(row)
                told = ", ".join(
                    f"batch {batch} {row[f'batch {batch}'] / 2**30:.2f} GiB" for batch in BATCHES
                )
                print(f"{base} {method}, {path}: {told}; aside {row['aside'] / 2**30:.2f} GiB", flush=True)
    return table


def main() -> None:
    """Print tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="parts of names, between semicolons: the cases to run")
    parser.add_argument("--full-size", action="store_true", help="SD 1.5 too: about 9 GiB, and minutes")
    parser.add_argument(
        "--plans", action="store_true", help="plans of full-size bases on a GPU, and nothing else"
    )
    parser.add_argument("--bases", nargs="+", choices=list(BASES), default=list(BASES), help="of --plans")
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
        table = (
            plans(folder, arguments.bases)
            if arguments.plans
            else compared(names, arguments.full_size, folder)
        )
    if arguments.json is not None:
        told = {name: getattr(arguments, name) for name in ("cases", "full_size", "plans", "bases")}
        write(arguments.json, "memory plans" if arguments.plans else "memory", told, table)


if __name__ == "__main__":
    main()
