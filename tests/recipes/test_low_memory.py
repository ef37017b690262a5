"""Whole runs that spare memory: quantised bases, weights in bfloat16, networks set aside; on the CPU, too."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

from tuner import device, loop
from tuner.cli import main
from tuner.family import Family
from tuner.log import read

Digests = Callable[[Path], dict[str, str]]
QUANTISED = [
    ("lora.yaml", "nf4", "bf16"),
    ("controlnet_canny.yaml", "int8", "fp32"),
    ("textual_inversion.yaml", "nf4", "fp32"),
]
QUICK = {"evaluate.samples": 0, "preview.every": 0}
BF16 = {"train.precision": "bf16", "train.trained_precision": "bf16", "train.learning_rate": 0.01}


def shapes_of(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Of every exported file its tensors' names and shapes."""
    found = {}
    for path in sorted((folder / "export").rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[str(path.relative_to(folder))] = {
                key: tuple(file.get_slice(key).get_shape())
                for key in file.keys()  # noqa: SIM118
            }
    return found


@pytest.mark.parametrize("recipe, scheme, precision", QUANTISED)
def test_runs_on_a_quantised_base(
    tiny: Any, tmp_path: Path, digests: Digests, recipe: str, scheme: str, precision: str
) -> None:
    """They train, prove and export the same files; these are made again from a checkpoint without
    quantising."""
    pytest.importorskip("bitsandbytes")
    quick = QUICK | {"train.precision": precision}
    assert tiny.start(recipe, tmp_path / "plain", **quick) == 0
    base = {"base": ..., "base.path": tiny.base, "base.quantise": scheme, "preview.every": 2}
    assert tiny.start(recipe, tmp_path / "stored", **(quick | base)) == 0
    found = shapes_of(tmp_path / "stored")
    assert found == shapes_of(tmp_path / "plain") and len(found) >= 1
    events = [text for _, text in read(tmp_path / "stored" / "metrics.jsonl").events]
    assert sum(text.startswith("verified: ") for text in events) >= 1
    assert len(list((tmp_path / "stored" / "previews").glob("*.png"))) == 1
    losses = [
        [value for _, value in read(tmp_path / name / "metrics.jsonl").scalars["loss"]]
        for name in ("plain", "stored")
    ]
    assert len(losses[0]) == 2 and losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    AcceleratorState._reset_state(True)
    assert main(["export", str(tmp_path / "stored"), "--out", str(tmp_path / "again")]) == 0
    again = digests(tmp_path / "again")
    assert len(again) >= 1 and again == digests(tmp_path / "stored" / "export")


def test_a_base_that_is_trained_is_not_quantised(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"base": ..., "base.path": tiny.base, "base.quantise": "nf4"}
    assert tiny.start("embedded/4_unet_128.yaml", tmp_path / "out", **more) == 2
    assert "base.quantise: method full trains the unet itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe, more",
    [
        ("lora.yaml", {"train.optimiser.name": "adamw8bit"}),
        ("embedded/4_unet_128.yaml", {"train.optimiser.name": "adamw8bit", "train.ema": 0.9}),
        ("controlnet_canny.yaml", {"train.ema": None, "train.accumulate": 2}),
    ],
)
def test_weights_in_bfloat16(
    tiny: Any, tmp_path: Path, digests: Digests, recipe: str, more: dict[str, Any]
) -> None:
    """Continued from its first step a run is the same bitwise; what is exported is proved, and made again."""
    pytest.importorskip("bitsandbytes")
    more = QUICK | BF16 | {"train.steps": 3, "train.checkpoint.every": 1, "train.checkpoint.keep": 9} | more
    first, second = tmp_path / "first", tmp_path / "second"
    assert tiny.start(recipe, first, **more) == 0
    trained = load_file(first / "checkpoints" / "step-0000003" / "trained.safetensors")
    assert len(trained) > 20 and {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    shutil.copytree(first, second)
    for step in (2, 3):
        shutil.rmtree(second / "checkpoints" / f"step-{step:07d}")
    for made in (second / "export", second / "finished.json"):
        shutil.rmtree(made) if made.is_dir() else made.unlink()
    cache = {"data.cache": tmp_path / "first-cache"}
    assert tiny.start(recipe, second, **more, **cache) == 0
    again = load_file(second / "checkpoints" / "step-0000003" / "trained.safetensors")
    assert again.keys() == trained.keys() and all(torch.equal(again[key], trained[key]) for key in trained)
    exported = digests(first / "export")
    assert len(exported) >= 1 and exported == digests(second / "export")
    AcceleratorState._reset_state(True)
    assert main(["export", str(first), "--out", str(tmp_path / "again")]) == 0
    assert digests(tmp_path / "again") == exported


@pytest.mark.parametrize("recipe", ["lora.yaml", "embedded/4_unet_128.yaml"])
def test_the_loss_falls_as_in_float32(tiny: Any, tmp_path: Path, recipe: str) -> None:
    """On the same batches; a LoRA's and a whole UNet's weights."""
    losses = {}
    for name in ("fp32", "bf16"):
        more = QUICK | {
            "train.precision": "bf16",
            "train.trained_precision": name,
            "train.steps": 10,
            "train.learning_rate": 2e-3,
            "train.optimiser.name": "adamw",
            "train.ema": None,
            "data.cache": tmp_path / "cache",
        }
        assert tiny.start(recipe, tmp_path / name, **more) == 0
        losses[name] = [value for _, value in read(tmp_path / name / "metrics.jsonl").scalars["loss"]]
    assert len(losses["fp32"]) == len(losses["bf16"]) == 10 and losses["fp32"] != losses["bf16"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)


@pytest.mark.parametrize(
    "more, told",
    [
        ({"train.precision": "auto"}, "bf16 needs train.precision bf16, and auto is fp32 on this machine"),
        ({"train.optimiser.name": "muon"}, "updates each tensor by itself, found muon"),
        ({"train.precision": "fp16"}, "found bf16, but precision is fp16"),
    ],
)
def test_what_cannot_be_held_in_bfloat16(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: dict[str, Any],
    told: str,
) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiny.start("lora.yaml", tmp_path / "out", **(BF16 | more)) == 2
    assert told in capsys.readouterr().err


RANKS = """
import sys
from pathlib import Path
sys.path[0] = sys.argv[1]
import torch
from tuner import build, device, loop, recipe
from tuner.log import Log
from tuner.signals import Stop
about = recipe.load(Path(sys.argv[2]))
accelerator = device.start(about.train.precision, about.train.threads)
assert accelerator.num_processes == 2
made = build.build(about, accelerator)
before = [p.detach().clone() for p in made.task.trained()]
with Log(made.output, False, None, accelerator.is_main_process, None, {}) as log, Stop() as stop:
    assert loop.train(made, log, None, stop)
seen = 0
for parameter, start in zip(made.task.trained(), before, strict=True):
    assert parameter.dtype == torch.bfloat16
    both = [torch.empty_like(parameter) for _ in range(2)]
    torch.distributed.all_gather(both, parameter.detach())
    assert torch.equal(both[0], both[1]), parameter.shape
    seen += not torch.equal(parameter, start)
print("equal and moved:", seen, flush=True)
accelerator.wait_for_everyone()
"""


def test_two_processes_round_alike(tiny: Any, tmp_path: Path) -> None:
    """The random bits do not depend on the process, so the weights stay the same on both."""
    (tmp_path / "ranks.py").write_text(RANKS, encoding="utf-8")
    overrides = tiny.overrides("lora.yaml", tmp_path / "out", **QUICK, **BF16, **{"train.steps": 3})
    from tuner import recipe

    about = recipe.load(tiny.root / "recipes" / "lora.yaml", tuple(overrides))
    (tmp_path / "r.yaml").write_text(about.resolved_yaml(), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    given = [str(tmp_path / "ranks.py"), str(tiny.root), str(tmp_path / "r.yaml")]
    done = subprocess.run(
        [*command, *given], capture_output=True, text=True, env=env, check=False, timeout=280
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    counts = [int(line.split()[-1]) for line in done.stdout.splitlines() if "equal and moved" in line]
    assert len(counts) == 2 and counts[0] == counts[1] > 20


def boom(*_: object, **__: object) -> None:
    raise AssertionError("a network that was set aside is asked")


class Record:
    """What happens in a run; networks that were set aside refuse to work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        put, aside, step = Family._put, Family._put_aside, loop.one_step

        def back(family: Family, names: Iterable[str], where: torch.device) -> None:
            names = list(names)
            put(family, names, where)
            for network in (family.modules()[name] for name in names):
                for call in ("forward", "encode", "decode"):
                    vars(network).pop(call, None)
            if names and len(names) < len(family.modules()):
                self.events.append(("back", tuple(names)))

        def away(family: Family) -> None:
            aside(family)
            for network in (family.modules()[name] for name in family._aside):
                for call in ("forward", "encode", "decode"):
                    setattr(network, call, boom)
            if family._aside:
                self.events[-1] = ("away", family._aside)

        def one(*given: Any) -> Any:
            self.events.append("step")
            return step(*given)

        monkeypatch.setattr(Family, "_put", back)
        monkeypatch.setattr(Family, "_put_aside", away)
        monkeypatch.setattr(loop, "one_step", one)


@pytest.mark.parametrize(
    "recipe, more, names",
    [
        ("lora.yaml", {}, ("vae", "text_encoder")),
        ("textual_inversion.yaml", {}, ("vae",)),
        ("lora.yaml", {"data.cache": "'off'"}, ()),
        ("lora.yaml", {"method.lora.text_encoder": True, "data.crop": "random"}, ()),
    ],
)
def test_what_is_cached_is_set_aside(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    more: dict[str, Any],
    names: tuple[str, ...],
) -> None:
    """No step and no validation asks it; it is back for previews, and for the exports and their proof."""
    record = Record(monkeypatch)
    more = {"train.steps": 4, "validate.every": 1, "preview.every": 2, "evaluate.samples": 2, **more}
    assert tiny.start(recipe, tmp_path / "out", **more) == 0
    away, back = ("away", names), ("back", names)
    once = ["step", "step", back, away] if names else ["step", "step"]
    assert record.events == ([away] if names else []) + 2 * once + ([back] if names else [])
    assert len(read(tmp_path / "out" / "metrics.jsonl").scalars["validation_loss"]) == 4


def test_a_plan_is_told_of_it(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`tuner check` tells what a quantised base needs."""
    pytest.importorskip("bitsandbytes")
    more = {"base": ..., "base.path": tiny.base, "base.quantise": "int8"}
    recipe = str(tiny.root / "recipes" / "lora.yaml")
    assert main(["check", recipe, "--json", *tiny.overrides("lora.yaml", tmp_path / "out", **more)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "quantise" in json.dumps(told)
