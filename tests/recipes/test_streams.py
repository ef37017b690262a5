"""Whole runs on what is read in passing: local tars, tars at addresses, sets of the Hub's stand-in."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file

from tuner import build, cli, device, loop, recipe
from tuner.data.flow import Flow, batches
from tuner.data.sources import retry
from tuner.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHARDS, EACH = 3, 5
SHAPES = ((32, 32), (24, 48), (34, 30))  # height, width
RECIPE = """
base: {base}
method: {method}
data: {data}
train:
  steps: {steps}
  batch_size: 2
  learning_rate: 0.5
  optimiser: {{name: sgd, weight_decay: 0}}
  clip: null
  precision: fp32
  threads: 1
  checkpoint: {{every: {every}}}
export: {{name: made}}
log: {{tensorboard: false}}
output: {output}
"""
LORA = "{lora: {rank: 2}}"
EXPORT = "export/made.safetensors"


def png(number: int) -> bytes:
    high, wide = SHAPES[number % len(SHAPES)]
    blocks = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(blocks).resize((wide, high), Image.Resampling.NEAREST).save(data, "PNG")
    return data.getvalue()


def shard(place: Path, first: int) -> Path:
    with tarfile.open(place, "w") as made:
        for number in range(first, first + EACH):
            text = b"a red toy" if number % 2 else b"a blue toy"
            for ending, data in (("png", png(number)), ("txt", text)):
                info = tarfile.TarInfo(f"{number:03d}.{ending}")
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))
    return place


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(SHARDS):
        shard(folder / f"{number}.tar", EACH * number)
    return folder


@pytest.fixture
def written(sd1_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A recipe's file; its data as YAML."""

    def write(
        data: str, output: str = "out", method: str = LORA, steps: int = 6, every: int = 2, more: str = ""
    ) -> Path:
        place = tmp_path / f"{output}.yaml"
        whole = f"{{{data}, resolution: 32, buckets: {{step: 8}}, flip: true, cache: {tmp_path / 'cache'}}}"
        about = {"base": sd1_folder, "output": tmp_path / output, "steps": steps, "every": every}
        place.write_text(RECIPE.format(data=whole, method=method, **about) + more)
        return place

    return write


def test_a_stopped_run_on_local_tars_ends_as_one_that_was_not(
    written: Callable[..., Path], tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"source: {{path: {tars}/*.tar, streaming: true, buffer: 4}}"
    assert cli.main(["train", str(written(f"{data}, workers: 0"))]) == 0
    said = capsys.readouterr().out
    assert "not cached: they are read in passing" in said
    assert f"{tars}/*.tar read in passing, 6 steps of 2 pictures" in said
    whole = (tmp_path / "out" / EXPORT).read_bytes()
    for workers, cut in ((0, 2), (1, 4)):
        name = f"out{workers}"
        part = written(f"{data}, workers: {workers}", name, steps=cut)
        assert cli.main(["train", str(part)]) == 0
        (tmp_path / name / "finished.json").unlink()
        capsys.readouterr()
        # The recipe in the file's metadata is to be the same.
        again = ["train", str(written(f"{data}, workers: {workers}", name)), f"output={tmp_path / name}"]
        assert cli.main(again) == 0
        assert f"({cut} of 6 steps are done)" in capsys.readouterr().out
        one, other = load_file(tmp_path / name / EXPORT), load_file(tmp_path / "out" / EXPORT)
        assert len(one) > 10 and all(torch.equal(one[key], other[key]) for key in other)
    assert whole == (tmp_path / "out" / EXPORT).read_bytes()


def test_the_loss_is_the_mean_over_the_batch(written: Callable[..., Path], tars: Path) -> None:
    place = written(f"source: {{path: {tars}/*.tar, streaming: true, buffer: 4, weight: 0.5}}")
    run = build.build(recipe.load(place), device.start("fp32", 1))
    assert isinstance(run.plan, Flow) and run.workers == 1
    for method in run.methods:
        method.train_mode(True)
    count = 0
    for batch in batches(run.data, run.plan, run.division, 0, 4, 0):
        assert batch.total == 2.0 and batch.weight.tolist() == [0.5, 0.5]
        assert batch.pixels is not None and batch.moments is None and batch.text is None
        with torch.no_grad():
            x_0 = run.task.latents(batch)
            t = run.task.objective.sample_t(batch.u)
            noised = run.task.objective.noise(x_0, batch.noise, t)
            assert batch.tokens is not None
            text = run.family.encode_prompts(batch.tokens)
            pred = run.family.predict(
                run.family.denoiser, noised.x_t, t, run.family.condition(text, None, None)
            )
            each = (pred - noised.target).square().mean(dim=(1, 2, 3)) * noised.weight
            loss, _ = run.task(batch)
        torch.testing.assert_close(loss, 0.5 * each.mean())
        count += 1
    assert count == 4


def test_a_broken_connection_keeps_what_was_trained(
    written: Callable[..., Path],
    tars: Path,
    tmp_path: Path,
    hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.serve(tars, "tester/tars", kind="dataset", private=True)
    hub.take_in(monkeypatch, tmp_path)
    monkeypatch.setattr(retry, "WAITS", (0.01, 0.01, 0.01))
    address = f"{hub.url}/datasets/tester/tars/resolve/main/{{0..2}}.tar"
    data = f"source: {{path: '{address}', buffer: 1}}, workers: 0"
    assert cli.main(["train", str(written(data, "whole", steps=12, every=50))]) == 0
    place = written(data, steps=12, every=50)
    hub.fail("GET", "/cdn/", "half")  # retried
    passing = loop.one_step
    done: list[int] = []

    def step(run: Any, *more: Any) -> Any:
        if len(done) == 5:  # from now on nothing comes
            hub.fail("GET", "/cdn/", "close", times=99)
        done.append(len(done))
        return passing(run, *more)

    monkeypatch.setattr(loop, "one_step", step)
    capsys.readouterr()
    assert cli.main(["train", str(place)]) == 2
    told = capsys.readouterr()
    assert "trying again in" in told.out and "the connection broke 4 times" in told.err
    assert "Traceback" not in told.err + told.out
    (kept,) = (tmp_path / "out" / "checkpoints").iterdir()
    steps = int(kept.name.removeprefix("step-"))
    assert 5 <= steps < 12
    hub.faults.clear()
    assert cli.main(["train", str(place)]) == 0
    assert f"({steps} of 12 steps are done)" in capsys.readouterr().out
    one, other = (load_file(tmp_path / name / EXPORT) for name in ("out", "whole"))
    assert len(one) > 10 and all(torch.equal(one[key], other[key]) for key in other)
    # Other bytes at the same addresses are another run's.
    hub.serve(shard(tars / "1.tar", 50).parent, "tester/tars", kind="dataset", private=True)
    (tmp_path / "out" / "finished.json").unlink()
    capsys.readouterr()
    assert cli.main(["train", str(place)]) == 2
    assert "data files: the checkpoint has" in capsys.readouterr().err


HUB_CODE = """
import sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(seconds / 100)
sys.path.insert(0, sys.argv.pop(1))
from tuner import cli
for one in sys.argv[1:]:
    code = cli.main(["train", *one.split("|")])
    assert code == 0, code
"""


@pytest.mark.slow
def test_a_set_of_the_hub_is_streamed_with_and_without_a_loading_process(
    written: Callable[..., Path], tmp_path: Path, hub: Any
) -> None:
    folder = tmp_path / "table" / "data"
    folder.mkdir(parents=True)
    for part in range(2):
        cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(4 * part, 4 * part + 4)]
        table = pa.table({"image": cells, "conditioning_image": cells, "text": ["a toy"] * 4})
        parquet.write_table(table, folder / f"train-{part:05d}-of-00002.parquet")
    hub.serve(tmp_path / "table", "tester/table", kind="dataset", private=True)
    data = "source: {path: 'hub:tester/table', streaming: true, buffer: 3}"
    method = "{controlnet: {condition: image}}"
    runs = [
        str(written(f"{data}, workers: 0", "a", method, steps=4)),
        str(written(f"{data}, workers: 1", "b", method, steps=2)),
    ]
    (tmp_path / "cwd").mkdir()

    def run(*these: str) -> str:
        environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", HUB_CODE, str(ROOT), *these]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path / "cwd", timeout=280
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    said = run(*runs)
    assert "hub:tester/table read in passing, 4 steps of 2 pictures" in said
    assert "not downloaded" not in said and "columns image (picture)" in said
    (tmp_path / "b" / "finished.json").unlink()
    said = run(str(written(f"{data}, workers: 1", "b", method, steps=4)))
    assert "(2 of 4 steps are done)" in said and "passing over what was trained on in 2 steps" in said
    files = sorted(
        path.relative_to(tmp_path / "a") for path in (tmp_path / "a/export").rglob("*.safetensors")
    )
    assert files
    for file in files:
        one, other = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert len(one) > 10 and all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize(
    "data, changes, told",
    [
        ("{path: T/*.tar, streaming: true}, {path: T/0.tar}", {}, "is read in passing and .* is not"),
        ("{path: T/*.tar, streaming: true}, {path: T/0.tar, streaming: true}", {}, "each source a share"),
        ("{path: T/*.tar, streaming: true}", {"train.steps": "null", "train.epochs": 1}, "train.epochs:"),
        (
            "{path: T/*.tar, streaming: true}",
            {"data.resolution": "null", "data.stages": "[{resolution: 24, steps: 3}, {resolution: 32}]"},
            "data.stages: .* which stages do not divide",
        ),
        ("{path: T/*.tar, streaming: true}", {"data.buckets.last": "padded"}, "all batches are full"),
        ("{path: T/*.tar, streaming: true}", {"export.tag_frequency": "true"}, "tags are not counted"),
        ("{path: T/*.tar, streaming: true}", {"data.masks.outside": 0.5}, "no sample has a mask"),
        ("{path: T/*.tar, streaming: true, repeats: 2}", {}, "repeats: has no effect"),
        ("{path: T/*.tar, buffer: 7}", {}, "buffer: has no effect"),
        ("{path: T/*.tar, streaming: true, buffer: 4}", {"data.heldout": "T/0.tar", "evaluate.samples": 1},
         "evaluate.samples: .* set 0"),
    ],
)  # fmt: skip
def test_what_a_stream_cannot_have_is_told(
    written: Callable[..., Path], tars: Path, data: str, changes: dict[str, Any], told: str
) -> None:
    place = written(f"source: [{data.replace('T', str(tars))}]")
    overrides = [f"{key}={str(value).replace('T', str(tars))}" for key, value in changes.items()]
    with pytest.raises(UserError, match=told):
        build.build(recipe.load(place, overrides), device.start("fp32", 1))


def test_held_out_samples_of_a_stream_and_words(
    written: Callable[..., Path], tars: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = (
        f"source: {{path: {tars}/*.tar, streaming: true, buffer: 4}}, "
        f"heldout: {{path: {tars}/2.tar, streaming: true}}, captions: {{drop: 0}}, workers: 2"
    )
    word = "{textual_inversion: {token: <new>, init: red, replace: toy}}"
    more = "validate: {every: 2, samples: 3}\n"
    assert cli.main(["train", str(written(data, method=word, steps=2, more=more))]) == 0
    assert "data.workers: one process loads what is read in passing" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation_loss" in row for row in rows) == 1
    word = "{textual_inversion: {token: <new>, init: red}}"
    assert cli.main(["train", str(written(data, "other", word, steps=2))]) == 2
    assert "lacks the token that is to be learned" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_and_another_number_of_them(
    written: Callable[..., Path], tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = written(f"source: {{path: {tars}/*.tar, streaming: true, buffer: 4}}", steps=4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, str(ROOT / "tuner" / "train.py"), str(place)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "cpu x 2" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and all(np.isfinite(losses))
    (tmp_path / "out" / "finished.json").unlink()
    assert cli.main(["train", str(place)]) == 2
    told = capsys.readouterr().err
    assert (
        "what is read in passing is divided among: the checkpoint has '2 processes x 1 accumulated'" in told
    )
