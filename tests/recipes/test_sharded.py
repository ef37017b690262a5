"""FSDP2 on two processes (gloo): what is shared out, and that nothing else is another than by DDP."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner import checkpoint, device, shard_files, sharding
from tuner.cli import main
from tuner.disk import DiskError
from tuner.errors import UserError
from tuner.training import Train

SCRIPT = Path(__file__).with_name("sharded.py")
FULL = "full: {text_encoder: true, checkpoint_file: false, pipeline: false}"
LORA = "lora: {rank: 4, text_encoder: true}"
# Plain descent with momentum: AdamW would make a whole step of a rounding.
RECIPE = """
base: {base}
method:
  {method}
data:
  source: {data}
  resolution: 32
  cache: {cache}
  heldout: {data}
  captions: {captions}
train:
  steps: {steps}
  batch_size: 4
  accumulate: {accumulate}
  learning_rate: {rate}
  optimiser: {optimiser}
  clip: {clip}
  ema: {ema}
  resume: {resume}
  precision: {precision}
  threads: 1
  gradient_checkpointing: {checkpointing}
  compile: "off"
preview: {{every: {steps}, steps: 1, count: 1, prompts: [a toy]}}
validate: {{every: {steps}, samples: 3}}
evaluate: {{samples: 0}}
export: {{dtype: fp32}}
log: {{tensorboard: false}}
output: {output}
"""
USUAL: dict[str, Any] = {
    "base": "{sd1}",
    "method": FULL,
    "steps": 2,
    "rate": 0.02,
    "optimiser": "{name: sgd, weight_decay: 0, options: {momentum: 0.9}}",
    "accumulate": 2,
    "clip": 0.5,
    "ema": 0.9,
    "resume": "auto",
    "precision": "fp32",
    "captions": "{}",
    "checkpointing": "false",
}
ADAMW = {"optimiser": "{name: adamw}", "rate": 0.001}
Table = Mapping[str, Mapping[str, Any]]


class Launches:
    """Recipes that are run on two processes, with and without FSDP2."""

    def __init__(self, root: Path, bases: Mapping[str, Path], data: Path) -> None:
        self.root, self.data = root, data
        self.named = {"{root}": str(root)} | {f"{{{name}}}": str(base) for name, base in bases.items()}

    def written(self, mode: str, recipes: Table) -> list[str]:
        """The recipes' files; {root} in a value is this folder, {sd1} a base."""
        (self.root / mode).mkdir(parents=True, exist_ok=True)
        places = []
        for name, changes in recipes.items():
            place = self.root / mode / f"{name}.yaml"
            values = {key: str(value) for key, value in (USUAL | dict(changes)).items()}
            for short, whole in self.named.items():
                values = {key: value.replace(short, whole) for key, value in values.items()}
            more = {
                "cache": self.root / f"cache-{mode}",
                "output": self.root / mode / name,
                "data": self.data,
            }
            place.write_text(RECIPE.format(**more, **values))
            places.append(str(place))
        return places

    def start(self, mode: str, recipes: Table, proved: bool = True) -> subprocess.Popen[str]:
        """Run them one after the other."""
        places = self.written(mode, recipes)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if mode == "fsdp":
            env |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
        command = [
            sys.executable,
            *launcher,
            str(SCRIPT),
            "2",
            str(int(proved)),
            str(self.root / mode),
            *places,
        ]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, mode: str, recipes: Table) -> str:
        return finished(self.start(mode, recipes))

    def facts(self, mode: str, name: str) -> dict[str, Any]:
        return dict(json.loads((self.root / mode / f"{name}.json").read_text()))

    def exported(self, mode: str, name: str) -> dict[str, torch.Tensor]:
        """Every tensor of a run's export, by file and name."""
        folder = self.root / mode / name / "export"
        files = sorted(folder.rglob("*.safetensors"))
        assert files, folder
        return {f"{f.relative_to(folder)} {n}": t for f in files for n, t in load_file(f).items()}


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out[-6000:]
    return out


def assert_close(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    assert one.keys() == other.keys() and len(one) > 30
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=rtol, atol=atol, msg=lambda m, k=key: f"{k}: {m}")


def assert_moved(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Two exports are not the same: what holds between equal ones says something."""
    assert one.keys() == other.keys()
    moved = sum(not torch.allclose(other[key], tensor, rtol=1e-4, atol=1e-5) for key, tensor in one.items())
    assert moved > len(one) / 4, (moved, len(one))


@pytest.fixture(scope="module")
def launches(shapes: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("sharded"), folders, shapes / "style")


@pytest.fixture(scope="module")
def both(launches: Launches) -> Launches:
    """The same runs by DDP and by FSDP2."""
    common: Table = {"full": {}, "lora": {"method": LORA, "rate": 0.5, "ema": "null", "clip": "null"}}
    for process in [launches.start(mode, common, proved=False) for mode in ("ddp", "fsdp")]:
        finished(process)
    return launches


def test_networks_are_shared_out_in_equal_parts(both: Launches) -> None:
    for name in ("full", "lora"):
        alone, facts = both.facts("ddp", name), both.facts("fsdp", name)
        assert (alone["processes"], alone["shared"]) == (2, False)
        assert (facts["processes"], facts["shared"]) == (2, True)
        kept = {"unet": 0, "text_encoder": 0}
        if name == "lora":  # of the adapters every process has all
            assert facts["trained"][2] == 0 and facts["trained"][0] == facts["trained"][1] > 20_000
            kept = {network: facts[network][3] - facts[network][2] for network in kept}
            assert sum(kept.values()) == facts["trained"][3] > 100
        else:
            everything, here, parted, count = facts["trained"]
            assert parted == count > 300 and 0.49 < here / everything < 0.52
        for network, adapters in kept.items():
            everything, here, parted, count = facts[network]
            own = facts["trained"][0] if name == "lora" else 0
            assert parted == count - adapters > 30
            assert 0.49 * (everything - own) < here < 0.52 * everything + own
        assert facts["kinds"] == alone["kinds"] and len(alone["kinds"]) > 20  # none is called FSDP...


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_export_is_that_of_ddp(both: Launches, name: str) -> None:
    """Within rounding: a shared block adds up its own gradients of an input before other blocks'."""
    assert_close(both.exported("ddp", name), both.exported("fsdp", name))
    rows = []
    for mode in ("ddp", "fsdp"):
        lines = (both.root / mode / name / "metrics.jsonl").read_text().splitlines()
        keys = ("loss", "gradient_norm", "validation_loss")
        rows.append([row[key] for row in map(json.loads, lines) for key in keys if key in row])
    assert len(rows[0]) == len(rows[1]) == 5
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_each_process_writes_its_part_of_a_checkpoint(both: Launches) -> None:
    sizes = {}
    for mode in ("ddp", "fsdp"):
        folder = both.root / mode / "full/checkpoints/step-0000002"
        sizes[mode] = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    parts = {name: size for name, size in sizes["fsdp"].items() if name.startswith("shards/")}
    assert len(parts) == 2 and sizes["fsdp"].keys() - parts.keys() == sizes["ddp"].keys()
    whole = sum(sizes["ddp"].values())
    assert all(0.45 < size / whole < 0.55 for size in parts.values()), (parts, sizes["ddp"])
    # Of adapters nothing is shared out, so a checkpoint of theirs is what it is without FSDP2.
    assert not (both.root / "fsdp/lora/checkpoints/step-0000002/shards").exists()


def test_a_missing_part_is_named_and_the_checkpoint_passed_over(
    both: Launches, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints" / "step-0000002"
    source = both.root / "fsdp/full/checkpoints/step-0000002"
    for file in (p for p in source.rglob("*") if p.is_file()):
        to = folder / file.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
    assert checkpoint.newest(tmp_path) is not None
    (part,) = folder.glob("shards/shard-00002*")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.newest(tmp_path) is None
    assert f"damaged (shards/{part.name})" in capsys.readouterr().out.replace("\n", "")
    part.unlink()
    assert checkpoint.newest(tmp_path) is None


OTHERS: dict[str, dict[str, Any]] = {
    "controlnet": {"method": "controlnet: {condition: canny, unlock_decoder_at: 1}", "ema": "null"},
    "words": {
        "method": "textual_inversion: {token: <new>, init: red}",
        "captions": "{prefix: '<new> '}",
        "rate": 0.5,
        "ema": "null",
        "clip": "null",
    },
    "bf16": {"method": LORA, "rate": 0.5, "ema": "null", "precision": "bf16"},
    "recomputed": {"checkpointing": "true"},
    "sdxl": {"base": "{sdxl}"},
    "adam": {"optimiser": "{name: adam}", "rate": 0.001},
    "lion": {"optimiser": "{name: lion}", "rate": 0.0001},
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_other_methods_and_other_ways(launches: Launches) -> None:
    started = [launches.start(mode, OTHERS) for mode in ("ddp", "fsdp")]
    for process in started:
        finished(process)
    for name in OTHERS:
        facts = launches.facts("fsdp", name)
        assert facts["processes"] == 2 and facts["shared"]
        one, other = launches.exported("ddp", name), launches.exported("fsdp", name)
        if name == "words":
            assert len(one) == 1
            torch.testing.assert_close(*one.values(), *other.values(), rtol=1e-5, atol=1e-6)
        elif name == "bf16":
            assert_close(one, other, rtol=0.02, atol=2e-3)
        elif name in ("adam", "lion"):  # whole steps of roundings, where a gradient is nothing but one
            pairs = [(tensor, other[key]) for key, tensor in one.items()]
            far = sum(int((~torch.isclose(*pair, rtol=1e-4, atol=1e-6)).sum()) for pair in pairs)
            assert far < 0.01 * sum(tensor.numel() for tensor in one.values()), (name, far)
        else:
            assert_close(one, other)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_checkpoints_go_on(both: Launches, capfd: pytest.CaptureFixture[str]) -> None:
    """On as many processes bit for bit; on one, and from DDP, within rounding. AdamW's step counts, too."""
    half = both.exported("fsdp", "full")
    more: Table = {
        "whole": {"steps": 4},
        "resumed": {"steps": 4, "resume": "{root}/fsdp/full"},
        "from-ddp": {"steps": 4, "resume": "{root}/ddp/full"},
        "adamw": {"steps": 4, **ADAMW},
        "adamw-half": ADAMW,
        "adamw-resumed": {"steps": 4, "resume": "{root}/fsdp/adamw-half", **ADAMW},
    }
    both.run("fsdp", more)
    (place,) = both.written("alone", {"alone": {"steps": 4, "resume": "{root}/fsdp/full", "accumulate": 4}})
    capfd.readouterr()
    assert main(["train", place]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert "continuing from" in told and "(processes x train.accumulate)" in told, told
    whole = both.exported("fsdp", "whole")
    assert_moved(half, whole)
    assert_close(whole, both.exported("fsdp", "from-ddp"))
    assert_close(whole, both.exported("alone", "alone"))
    for name in ("", "adamw-"):
        one = both.exported("fsdp", name.removesuffix("-") or "whole")
        other = both.exported("fsdp", f"{name}resumed")
        assert one.keys() == other.keys() and len(one) > 300
        assert all(torch.equal(other[key], tensor) for key, tensor in one.items())


def test_a_disk_that_takes_no_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "shards"
    with (
        warnings.catch_warnings(),
        pytest.raises(DiskError, match="shards: cannot be written: Not a directory"),
    ):
        warnings.simplefilter("ignore")  # torch sees that there are no other processes
        shard_files.write(place, {"trained/a": torch.ones(2)})


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "version 1": ({"FSDP_VERSION": "1"}, "found 1; expected 2"),
    "no version": ({"FSDP_VERSION": ""}, "FSDP2 is what is supported"),
    "offload": ({"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS): found true; expected false"),
    "recomputing": ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing"),
    "a typo": ({"FSDP_RESHARD_AFTER_FORWARD": "full_shard"}, "found full_shard; expected true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, words = REFUSED[name]
    for key, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **env}.items():
        monkeypatch.setenv(key, value)
    device.sharding.cache_clear()
    try:
        with pytest.raises(UserError) as found:
            device.sharding()
        assert words in str(found.value)
    finally:
        monkeypatch.undo()
        device.sharding.cache_clear()
        assert device.sharding() is None


def test_the_launchers_words_are_taken_away(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As `accelerate launch` sets them of a configuration; accelerate and transformers would act on them."""
    told = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_RESHARD_AFTER_FORWARD": "false",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    }
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    device.sharding.cache_clear()
    try:
        assert device.sharding() == device.Sharding(reshard=False)
        assert not told.keys() & os.environ.keys()
        assert device.sharding() == device.Sharding(reshard=False)  # it is remembered
    finally:
        monkeypatch.undo()
        device.sharding.cache_clear()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FSDP_STATE_DICT_TYPE=FULL_STATE_DICT has no effect")


UNFIT: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "optimiser": (
        "full",
        {},
        {"optimiser": {"name": "muon"}},
        "train.optimiser: muon cannot be used on parted tensors",
    ),
    "fp16": ("lora", {}, {"precision": "fp16"}, "train.precision: found fp16"),
    "rank": ("controlnet", {"rank": 4}, {}, "method.controlnet.rank"),
    "small": ("autoencoder", {}, {}, "method autoencoder trains small networks"),
    "rounded": ("full", {}, {"trained_precision": "bf16"}, "train.trained_precision: found bf16"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_run_that_cannot_be_shared_out_is_refused(name: str, models: Any, sd1_folder: Path) -> None:
    method, config, changes, words = UNFIT[name]
    family = models.family_of(sd1_folder, method)
    precision = changes.get("precision", "no")
    about = Train(
        steps=1, batch_size=1, learning_rate=1.0, **{k: v for k, v in changes.items() if k != "precision"}
    )
    with pytest.raises(UserError, match=words):
        sharding.check(family, [models.method_of(method, family, **config)], about, precision)


def test_small_things_take_any_optimiser(models: Any, sd1_folder: Path) -> None:
    family = models.family_of(sd1_folder, "lora")
    about = Train(
        steps=1, batch_size=1, learning_rate=1.0, optimiser={"name": "prodigy"}, trained_precision="bf16"
    )
    sharding.check(family, [models.method_of("lora", family)], about, "bf16")
