"""One process and two (gloo) train the same on the same batches, within rounding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.data.samples import Sample

SCRIPT = Path(__file__).with_name("processes.py")
METHODS = {
    "controlnet": "controlnet: canny",
    "textual_inversion": "textual_inversion: {token: <new>, init: red, replace: toy}",
    "lora": "lora: {rank: 4, text_encoder: true}",
    "words": "textual_inversion: {norm: kept, tokens: [{token: <new>, init: red, vectors: 2, replace: toy}, "
    "{token: <by>, init: random, replace: in}]}",
    "words_sd2": "textual_inversion: {token: <new>, init: red, replace: toy}",
    "words_sdxl": "textual_inversion: {token: <new>, init: red, replace: toy}",
    "pivotal": "lora: {rank: 4, text_encoder: true}\n  "
    "textual_inversion: {token: <new>, init: red, replace: toy, learning_rate: 0.2}",
    "unlocked": "controlnet: {condition: canny, unlock_decoder_at: 1}",
    "low_rank": "controlnet: {condition: canny, rank: 4}",
    "dreambooth": "full: {text_encoder: true, prior: {prompt: a toy, count: 3, steps: 1}}",
}
BASES = {"words_sd2": "sd2", "words_sdxl": "sdxl"}  # of the others sd1
RATES = {"dreambooth": 0.02, "unlocked": 0.02}  # of the others 0.5
# Three steps of batches of 4 of 6 pictures: the second is an epoch's last, half of it of weight 0, so that
# one of two processes has nothing but filled places.
RECIPE = """
base: {base}
method:
  {method}
data:
  source: {data}
  resolution: 32
  cache: {cache}
  flip: true
train:
  steps: 3
  batch_size: 4
  accumulate: {accumulate}
  # Plain descent: unlike AdamW and clipping it shows a wrong scale, and makes no whole step of a rounding.
  learning_rate: {rate}
  optimiser: {{name: sgd, weight_decay: 0}}
  clip: null
  precision: fp32
  threads: 1
log: {{tensorboard: false}}
output: {output}
"""


def written(folder: Path, accumulate: int, bases: dict[str, Path], data: Path) -> list[Path]:
    """A recipe for each method."""
    folder.mkdir()
    places = []
    for name, method in METHODS.items():
        place = folder / f"{name}.yaml"
        # Every run has its own cache: each encodes for itself.
        more = {"cache": folder / "cache", "output": folder / name, "accumulate": accumulate}
        more |= {"rate": RATES.get(name, 0.5)}
        place.write_text(RECIPE.format(base=bases[BASES.get(name, "sd1")], method=method, data=data, **more))
        places.append(place)
    return places


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out[-4000:]
    return out


@pytest.fixture(scope="module")
def trained(
    folders: dict[str, Path], samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """What one process and two came to, all methods in one launch each."""
    root = tmp_path_factory.mktemp("processes")
    for sample in samples:
        sample.picture.path.with_suffix(".txt").write_text(sample.captions[0])
    data = samples[0].picture.path.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
    ]
    started = []
    for processes, start, accumulate in ((1, [sys.executable], 2), (2, launcher, 1)):
        recipes = written(root / str(processes), accumulate, folders, data)
        command = [*start, str(SCRIPT), str(processes), str(root / str(processes)), *map(str, recipes)]
        started.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in started:
        finished(process)
    return {1: root / "1", 2: root / "2"}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one(trained: dict[int, Path], name: str) -> None:
    for processes, folder in trained.items():
        facts: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        frozen = facts.pop("frozen")
        assert frozen > 100 and facts.pop("as before") == frozen
        assert facts == {"processes": processes, "accumulate": 3 - processes}
    one, two = (load_file(trained[processes] / f"{name}.safetensors") for processes in (1, 2))
    assert one.keys() == two.keys() and one
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_report_the_same_losses(trained: dict[int, Path], name: str) -> None:
    rows = []
    for folder in trained.values():
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        rows.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    one, two = rows
    assert len(one) == len(two) == 3
    assert one == pytest.approx(two, rel=1e-5)
