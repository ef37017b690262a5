"""One process, two and four (gloo, by torchrun) train the same on the same batches, within rounding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.data.cache import Store
from tuner.data.samples import Sample

pytestmark = pytest.mark.timeout(600)  # the first test with so many processes waits for all that they do

SCRIPT = Path(__file__).with_name("processes.py")
METHODS = {
    "controlnet": "controlnet: canny",
    "textual_inversion": "textual_inversion: {token: <new>, init: red, replace: toy}",
    "lora": "lora: {rank: 4, text_encoder: true}",
    "full": "full: {}",
    "accumulated": "lora: {rank: 4, text_encoder: true}",
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
BY_FOUR = ("controlnet", "textual_inversion", "lora", "full", "accumulated")
BASES = {"words_sd2": "sd2", "words_sdxl": "sdxl"}  # of the others sd1
RATES = {"dreambooth": 0.02, "unlocked": 0.02, "full": 0.02}  # of the others 0.5
BATCHES = {"accumulated": 8}  # of the others 4; one for each forward pass of 4 processes, or two
REPEATS = {"accumulated": 2}
# Three steps of batches of 4 of 6 pictures: the second is an epoch's last, half of it of weight 0, so that
# one of two processes has nothing but filled places.
RECIPE = """
base: {base}
method:
  {method}
data:
  source: {{path: {data}, repeats: {repeats}}}
  resolution: 32
  cache: {cache}
  flip: true
train:
  steps: 3
  batch_size: {batch}
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
# All that a run does besides training; its steps come from epochs.
WHOLE = """
base: {base}
method:
  lora: {{rank: 4}}
data: {{source: {data}, heldout: {data}, resolution: 32, cache: {cache}}}
train:
  epochs: 4
  batch_size: 4
  accumulate: {accumulate}
  learning_rate: 1e-3
  warmup: 3
  schedule: cosine
  ema: 0.9
  precision: fp32
  threads: 1
  checkpoint: {{every: 3, keep: 9}}
validate: {{every: 4, samples: 3}}
preview: {{every: 4, steps: 1, count: 1}}
export: {{every: 4}}
evaluate: {{samples: 0}}
log: {{tensorboard: true}}
output: {output}
"""
STEPS = 8
PICTURES = 6


def accumulate(name: str, processes: int) -> int:
    """Forward passes of a process in a step: all of them together divide the batch."""
    return 8 // processes if name == "accumulated" else max(1, 2 // processes)


def written(folder: Path, processes: int, bases: dict[str, Path], data: Path) -> list[Path]:
    """A recipe for each method, and the whole one."""
    folder.mkdir()
    places = []
    for name in [*(BY_FOUR if processes == 4 else METHODS), "whole"]:
        place = folder / f"{name}.yaml"
        # Every launch has its own cache: each encodes for itself; so have whole runs.
        cache = folder / ("cache-whole" if name == "whole" else "cache")
        more: dict[str, Any] = {"cache": cache, "output": folder / name, "data": data}
        more |= {"base": bases[BASES.get(name, "sd1")], "accumulate": accumulate(name, processes)}
        more |= {"rate": RATES.get(name, 0.5), "batch": BATCHES.get(name, 4)}
        more |= {"repeats": REPEATS.get(name, 1), "method": METHODS.get(name)}
        place.write_text((WHOLE if name == "whole" else RECIPE).format(**more))
        places.append(place)
    return places


def command(processes: int) -> list[str]:
    """How so many processes are started."""
    if processes == 1:
        return [sys.executable]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    return [*torchrun, "--nproc_per_node", str(processes), "--master_port", str(port)]


Trained = Callable[[int], Path]


@pytest.fixture(scope="module")
def trained(
    folders: dict[str, Path], samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    """What so many processes came to, all methods in one launch each."""
    root = tmp_path_factory.mktemp("processes")
    for sample in samples:
        sample.picture.path.with_suffix(".txt").write_text(sample.captions[0])
    data = samples[0].picture.path.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def launch(processes: int) -> Path:
        folder = root / str(processes)
        if not folder.exists():
            recipes = written(folder, processes, folders, data)
            asked = [*command(processes), str(SCRIPT), str(processes), str(folder), *map(str, recipes)]
            done = subprocess.run(asked, env=env, capture_output=True, text=True, timeout=560)
            assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return folder

    return launch


four = pytest.param(4, marks=pytest.mark.slow)
BOTH = [(2, name) for name in METHODS] + [
    pytest.param(4, name, marks=pytest.mark.slow, id=f"4-{name}") for name in BY_FOUR
]


@pytest.mark.parametrize("processes, name", BOTH)
def test_several_processes_train_as_one(trained: Trained, processes: int, name: str) -> None:
    for number in (1, processes):
        facts: dict[str, Any] = json.loads((trained(number) / f"{name}.json").read_text())
        frozen = facts.pop("frozen")
        assert frozen > 100 and facts.pop("as before") == frozen
        assert facts == {"processes": number, "accumulate": accumulate(name, number)}
    one, other = (load_file(trained(number) / f"{name}.safetensors") for number in (1, processes))
    assert one.keys() == other.keys() and one
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def rows(folder: Path, key: str) -> list[tuple[int, float]]:
    """Steps and values of a figure in a log."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row[key]) for row in lines if key in row]


@pytest.mark.parametrize("processes, name", BOTH)
def test_several_processes_report_the_same_losses(trained: Trained, processes: int, name: str) -> None:
    one, other = (rows(trained(number) / name, "loss") for number in (1, processes))
    assert [step for step, _ in one] == [step for step, _ in other] == [1, 2, 3]
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], rel=1e-5)


@pytest.mark.parametrize("processes", [2, four])
def test_rates_steps_and_looks_are_those_of_one(trained: Trained, processes: int) -> None:
    one, other = trained(1) / "whole", trained(processes) / "whole"
    rates = rows(one, "learning_rate")
    assert [step for step, _ in rates] == list(range(1, STEPS + 1))  # 4 epochs of 2 steps
    values = [rate for _, rate in rates]
    assert values[:4] == pytest.approx([0.0, 1e-3 / 3, 2e-3 / 3, 1e-3])
    assert values[3:] == sorted(values[3:])[::-1] and 0 < values[-1] < 2e-4
    assert rows(other, "learning_rate") == rates  # exactly
    for key in ("loss", "validation_loss", "gradient_norm"):
        of_one, of_other = rows(one, key), rows(other, key)
        assert [step for step, _ in of_one] == [step for step, _ in of_other]
        assert len(of_one) == (2 if key == "validation_loss" else STEPS)
        assert [v for _, v in of_one] == pytest.approx([v for _, v in of_other], rel=1e-3)
    for name in ("checkpoints", "previews", "export"):
        found = [sorted(place.name for place in (run / name).iterdir()) for run in (one, other)]
        assert found[0] == found[1] and len(found[0]) >= 2, (name, found)
    assert [p.name for p in sorted((other / "checkpoints").iterdir())] == [
        f"step-{step:07d}" for step in (3, 6, 8)
    ]
    last = "checkpoints/step-0000008/state.pt"
    averages = [torch.load(run / last, weights_only=True)["ema"] for run in (one, other)]
    flat = [[t for t in leaves(average) if isinstance(t, torch.Tensor)] for average in averages]
    assert len(flat[0]) == len(flat[1]) > 10
    for ours, theirs in zip(*flat, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-5)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [one for part in tree for one in leaves(part)] if isinstance(tree, list | tuple) else [tree]


@pytest.mark.parametrize("processes", [1, 2, four])
@pytest.mark.parametrize("name, looks", [("controlnet", 2), ("whole", 1)])
def test_each_picture_is_encoded_once_by_one_process(
    trained: Trained, processes: int, name: str, looks: int
) -> None:
    told = [json.loads((trained(processes) / f"{name}-{r}.json").read_text()) for r in range(processes)]
    shares = [one["encoded"] for one in told]
    every = [picture for share in shares for picture in share]
    # Of the first recipe with this cache: each picture as it is and, where it may be, mirrored. The held-out
    # ones of the whole run are those that it trains on: the cache has them.
    assert len(every) == len(set(every)) == looks * PICTURES
    assert max(map(len, shares)) - min(map(len, shares)) <= 1, [len(share) for share in shares]
    cache = trained(processes) / ("cache-whole" if name == "whole" else "cache")
    assert len(Store(cache / "latents")) >= len(every)


@pytest.mark.parametrize("processes", [2, four])
@pytest.mark.parametrize("name", ["lora", "whole"])
def test_one_process_writes_the_output(trained: Trained, processes: int, name: str) -> None:
    folder = trained(processes)
    told = [json.loads((folder / f"{name}-{r}.json").read_text())["changed"] for r in range(processes)]
    assert len(told) == processes
    assert [changes for changes in told[1:] if changes] == []
    files = {str(p.relative_to(folder / name)) for p in (folder / name).rglob("*") if p.is_file()}
    assert "metrics.jsonl" in files and len(files) >= (20 if name == "whole" else 4)
    assert any(line.endswith("metrics.jsonl") or "metrics.jsonl.part" in line for line in told[0])
    assert any(line.startswith("safetensors checkpoints") for line in told[0])
