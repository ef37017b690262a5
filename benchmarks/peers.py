"""Our runs beside those of the diffusers training scripts: speed, start, memory, and what was learned.

    python benchmarks/peers.py DIFFUSERS [--methods lora ...] [--settings default ...] [--steps 500]

DIFFUSERS is a checkout of diffusers, whose examples/ hold the scripts; they need torchvision besides what
this project needs. Both sides train from the embedded base on the same 64 pictures of the shapes world (drawn
by datasets/shapes/prepare.py) with the same batch, resolution, learning rate, AdamW, seed and number of
threads, in fresh processes, in the order A-B-A-B, with cold caches (PYTHONPATH is for the scripts alone).
Settings:

    default     each as it comes, both in float32
    allocator   the same, and the same settings of glibc's allocator for both (ours sets its own otherwise)
    uncached    default, and ours with data.cache: off
    precision   each as it comes: ours in bfloat16 where the processor has it (train.precision: auto)

Reported are the time from the start of the process to the last step (building caches is in it), the steps a
second of the steady part (after the first fifth), CPU seconds a step, the largest resident memory up to the
last step, and the validation loss of both results: read back as method.*.start, on held-out pictures with
fixed noise and timesteps. Ratios are of sums over the rounds; the spread is told beside them.
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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from envelope import write

ROOT = Path(__file__).resolve().parents[1]
PICTURES, HELDOUT, BATCH, SIDE = 64, 64, 4, 128
SETTINGS = ("default", "allocator", "uncached", "precision")
# What training_scripts.md's interleaved runs found best for the scripts.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "100000000",
}


@dataclass(frozen=True)
class Case:
    """A method, as both sides are told of it.

    Attributes:
        script: the peer's, below its examples/.
        given: its options besides those that all have.
        result: the file or folder that it leaves in its output folder.
        method, data: our recipe's blocks.
        exported: our export, below export/.
        start: our method block that goes on from a result.
    """

    script: str
    given: str
    result: str
    method: str
    data: str
    exported: str
    start: str
    rate: float
    clip: str = "1.0"


CASES = {
    "lora": Case(
        "text_to_image/train_text_to_image_lora.py",
        "--train_data_dir {data}/pictures --caption_column text --image_column image --rank 4",
        "pytorch_lora_weights.safetensors",
        "{lora: {rank: 4, targets: attention, init: gaussian}}",
        "{source: DATA/pictures, heldout: DATA/heldout",
        "run.safetensors",
        "{lora: {rank: 4, targets: attention, start: RESULT}}",
        1e-3,
    ),
    "textual_inversion": Case(
        "textual_inversion/textual_inversion.py",
        "--train_data_dir {data}/plain --placeholder_token <new> --initializer_token shape "
        "--save_steps 1000000",
        "learned_embeds.safetensors",
        "{textual_inversion: {token: <new>, init: shape, templates: object}}",
        "{source: DATA/words, heldout: DATA/heldout_words, flip: true",
        "new.safetensors",
        "{textual_inversion: {token: <new>, init: RESULT, templates: object}}",
        5e-3,
        "null",  # the script has no limit
    ),
    "controlnet": Case(
        "controlnet/train_controlnet.py",
        "--train_data_dir {data}/pairs --caption_column text --image_column image "
        "--conditioning_image_column conditioning_image --num_train_epochs 1000",
        ".",
        "{controlnet: {condition: image}}",
        "{source: DATA/pairs, heldout: DATA/heldout_pairs, captions: {drop: 0}",
        "diffusers",
        "{controlnet: {condition: image, start: RESULT}}",
        5e-4,
    ),
}


def data(place: Path) -> None:
    """The pictures as each side and method reads them: the same bytes."""
    sources = {"": ROOT / "datasets/shapes/train", "heldout": ROOT / "datasets/shapes/heldout"}
    for before, source in sources.items():
        lines = (source / "metadata.jsonl").read_text().splitlines()[: PICTURES if not before else HELDOUT]
        rows = [json.loads(line) for line in lines]
        assert len(rows) == (PICTURES if not before else HELDOUT)
        for kind in ("pictures", "words", "pairs", *([] if before else ["plain"])):
            name = kind if not before else before if kind == "pictures" else f"{before}_{kind}"
            _folder(place / name, source, rows, kind)


def _folder(folder: Path, source: Path, rows: list[dict[str, Any]], kind: str) -> None:
    """One folder of pictures with what is said of them."""
    import cv2

    folder.mkdir(parents=True)
    listing = []
    for row in rows:
        name = row["file_name"]
        shutil.copy(source / name, folder / name)
        text = row["text"]
        line = {"file_name": name, "text": text[0] if isinstance(text, list) else text}
        if kind == "words":
            line["text"] = "<new>"
        if kind == "pairs":
            edges = cv2.Canny(cv2.imread(str(source / name)), 100, 200)
            (folder / "conditions").mkdir(exist_ok=True)
            cv2.imwrite(str(folder / "conditions" / name), cv2.cvtColor(edges, cv2.COLOR_GRAY2BGR))
            line["conditioning_image_file_name"] = f"conditions/{name}"
        listing.append(json.dumps(line))
    if kind != "plain":
        (folder / "metadata.jsonl").write_text("\n".join(listing) + "\n")


def theirs(case: Case, asked: argparse.Namespace, place: Path) -> list[str]:
    """The arguments of the script."""
    script = Path(asked.diffusers).resolve() / "examples" / case.script
    common = (
        f"--pretrained_model_name_or_path {ROOT / 'tuner/embedded'} --resolution {SIDE} "
        f"--train_batch_size {BATCH} --max_train_steps {asked.steps} --learning_rate {case.rate} "
        f"--lr_scheduler constant --lr_warmup_steps 0 --seed 1 --output_dir {place} "
        f"--checkpointing_steps 1000000"
    )
    return [str(script), *common.split(), *case.given.format(data=asked.folder / "data").split()]


def recipe(
    case: Case, asked: argparse.Namespace, place: Path, setting: str, start: Path | None = None
) -> str:
    """Our recipe, or the one that reads a result back."""
    folder = str(asked.folder / "data")
    method = case.method if start is None else case.start.replace("RESULT", str(start))
    cache = "'off'" if setting == "uncached" else str(place / "cache")
    precision = "auto" if setting == "precision" and start is None else "fp32"
    columns = ""
    source = case.data.replace("DATA", folder)
    if "pairs" in source:
        columns = "{path: %s, columns: {condition: conditioning_image_file_name}}"
        for name in ("pairs", "heldout_pairs"):
            source = source.replace(f": {folder}/{name}", f": {columns % f'{folder}/{name}'}")
    return (
        f"base: embedded\nmethod: {method}\n"
        f"data: {source}, resolution: {SIDE}, cache: {cache}}}\n"
        f"train: {{steps: {asked.steps}, batch_size: {BATCH}, learning_rate: {case.rate}, seed: 1, "
        f"clip: {case.clip}, precision: {precision}, threads: {asked.threads}}}\n"
        f"validate: {{every: 1000000, samples: {HELDOUT}}}\nevaluate: {{samples: 0}}\n"
        f"export: {{dtype: fp32, name: run}}\noutput: {place / 'output'}\n"
    )


def arm(side: str, case: Case, asked: argparse.Namespace, setting: str) -> dict[str, Any]:
    """One run in a fresh process; its figures, and where its result lies."""
    place = Path(tempfile.mkdtemp(prefix=f"{side}-", dir=asked.folder))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")},
        "OMP_NUM_THREADS": str(asked.threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(place / "home"),  # cold: what datasets prepares is not there yet
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        **(MALLOC if setting == "allocator" else {}),
    }
    if side == "theirs":
        arguments = theirs(case, asked, place)
    else:
        environment.pop("PYTHONPATH", None)  # for a torchvision that only the scripts need
        (place / "run.yaml").write_text(recipe(case, asked, place, setting))
        arguments = [str(ROOT / "tuner/train.py"), str(place / "run.yaml")]
    figures = place / "figures.json"
    began = time.time()
    child = [sys.executable, str(ROOT / "benchmarks/peers_run.py"), side, str(figures), str(began)]
    with (place / "log").open("w") as log:
        code = subprocess.run(
            [*child, str(asked.steps), *arguments], env=environment, stdout=log, stderr=log, check=False
        ).returncode
    if code or not figures.exists():
        print((place / "log").read_text()[-4000:])
        raise SystemExit(f"{side} ({' '.join(arguments)}) failed with {code}")
    result = place / case.result if side == "theirs" else place / "output/export" / case.exported
    assert result.exists(), result
    return {**json.loads(figures.read_text()), "whole_seconds": time.time() - began, "result": result}


def loss(case: Case, asked: argparse.Namespace, result: Path) -> float:
    """The validation loss of a result, in a process of its own."""
    place = Path(tempfile.mkdtemp(prefix="loss-", dir=asked.folder))
    (place / "run.yaml").write_text(recipe(case, asked, place, "default", result))
    command = [sys.executable, str(ROOT / "benchmarks/peers_run.py"), "loss", str(place / "run.yaml")]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return float(done.stdout.splitlines()[-1])


def compare(name: str, setting: str, asked: argparse.Namespace) -> dict[str, Any]:
    """One row: a method under a setting, in A-B-A-B order."""
    case, runs = CASES[name], {"theirs": [], "ours": []}  # type: ignore[var-annotated]
    for number in range(asked.rounds):
        for side, all_ in runs.items():
            one = arm(side, case, asked, setting)
            all_.append(one)
            print(
                f"{name} {setting} round {number + 1} {side}: {one['to_last_step']:.1f} s to the last step, "
                f"{one['steps_per_second']:.2f} steps/s, {one['cpu_per_step']:.3f} CPU s a step, "
                f"{one['peak_mib']:.0f} MiB",
                flush=True,
            )
    row: dict[str, Any] = {"method": name, "setting": setting, "rounds": asked.rounds, "steps": asked.steps}
    for side, all_ in runs.items():
        row[side] = {key: median(one[key] for one in all_) for key in all_[0] if key != "result"}
        row[side]["precision"] = all_[0]["precision"]
        row[side]["validation_loss"] = loss(case, asked, all_[-1]["result"])
    both = list(zip(runs["theirs"], runs["ours"], strict=True))
    row["pairs"] = [t["to_last_step"] / o["to_last_step"] for t, o in both]
    row["cold_start_ratio"] = sum(t["to_last_step"] for t, _ in both) / sum(
        o["to_last_step"] for _, o in both
    )
    row["steady_ratio"] = sum(1 / t["steps_per_second"] for t, _ in both) / sum(
        1 / o["steps_per_second"] for _, o in both
    )
    row["cpu_ratio"] = sum(t["cpu_seconds"] for t, _ in both) / sum(o["cpu_seconds"] for _, o in both)
    row["memory_ratio"] = row["theirs"]["peak_mib"] / row["ours"]["peak_mib"]
    print(
        f"{name} {setting}: theirs / ours {row['cold_start_ratio']:.2f} from cold start "
        f"({', '.join(f'{pair:.2f}' for pair in row['pairs'])}), {row['steady_ratio']:.2f} steady, "
        f"{row['cpu_ratio']:.2f} CPU seconds, {row['memory_ratio']:.2f} memory; validation loss "
        f"{row['theirs']['validation_loss']:.5f} and {row['ours']['validation_loss']:.5f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("diffusers", help="a checkout of diffusers")
    parser.add_argument("--methods", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where the runs lie; null: a temporary folder")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/peers.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        asked.folder = Path(asked.folder or temporary).resolve()
        if not (asked.folder / "data").exists():
            data(asked.folder / "data")
        rows = [compare(name, setting, asked) for setting in asked.settings for name in asked.methods]
    arguments = {"steps": asked.steps, "rounds": asked.rounds, "threads": asked.threads, "batch": BATCH}
    write(asked.json, "peers", arguments, rows)


if __name__ == "__main__":
    main()
