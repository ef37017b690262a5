"""Whole runs with train.compile: what is trained agrees with a run without it, and continues exactly."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner.compiled import Compiling
from tuner.log import read

RECIPES = ("lora.yaml", "textual_inversion.yaml", "controlnet_canny.yaml")
QUIET = {"preview__every": 0, "validate__every": 0, "evaluate__samples": 0}


@pytest.fixture(scope="module")
def small(models: ModuleType, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with a UNet of one level: tracing takes as long as a network has layers."""
    folder = tmp_path_factory.mktemp("base") / "small"
    shutil.copytree(sd1_folder, folder)
    one = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = models.unet(models.WIDTH, block_out_channels=(32,), attention_head_dim=2, **one)
    unet.save_pretrained(folder / "unet")
    return folder


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that was traced before; a cache of its own for all tests; no log of all that is traced."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    logging.getLogger("torch.__trace").propagate = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Compiling.__init__
    monkeypatch.setattr(Compiling, "__init__", functools.partialmethod(made, backend=backend))  # type: ignore[arg-type]


def trained(output: Path, step: int) -> dict[str, torch.Tensor]:
    found = load_file(output / f"checkpoints/step-{step:07d}/trained.safetensors")
    assert found
    return found


def compare(tiny: Any, recipe: str, folder: Path, base: Path) -> None:
    """Four steps with and without it: each tensor's way from its start differs by a hundredth at most."""
    asked = {"base": base, "train__steps": 4, "train__checkpoint__every": 1, "train__checkpoint__keep": 9}
    for name in ("off", "on"):
        more = {"train__compile": name, **asked, **QUIET}
        assert tiny.start(recipe, folder / name, **more) == 0
    found, expected = trained(folder / "on", 4), trained(folder / "off", 4)
    begun = trained(folder / "off", 1)
    assert found.keys() == expected.keys() == begun.keys()
    for name, tensor in found.items():
        way = float((expected[name].double() - begun[name].double()).norm())
        away = float((tensor.double() - expected[name].double()).norm())
        assert away <= 0.01 * way + 1e-7, (name, away, way)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1, "something was compiled"


@pytest.mark.slow
def test_a_lora_trains_the_same(
    tiny: Any, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("aot_eager", monkeypatch)
    torch._dynamo.utils.counters.clear()
    compare(tiny, "lora.yaml", tmp_path, small)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_method_trains_the_same_by_inductor(tiny: Any, tmp_path: Path, small: Path, recipe: str) -> None:
    torch._dynamo.utils.counters.clear()
    compare(tiny, recipe, tmp_path, small)


@pytest.mark.slow
def test_a_compiled_run_continues_exactly(
    tiny: Any,
    tmp_path: Path,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use("aot_eager", monkeypatch)
    asked = {"base": small, "train__compile": "on", **QUIET}
    assert tiny.start("textual_inversion.yaml", tmp_path / "whole", train__steps=4, **asked) == 0
    for steps in (2, 4):
        assert tiny.start("textual_inversion.yaml", tmp_path / "parts", train__steps=steps, **asked) == 0
    assert "will be, bit for bit" in capsys.readouterr().out
    whole, parts = trained(tmp_path / "whole", 4), trained(tmp_path / "parts", 4)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    more = {**asked, "train__compile": "off", "train__steps": 5}
    assert tiny.start("textual_inversion.yaml", tmp_path / "parts", **more) == 0
    assert "compile was on and is off" in capsys.readouterr().out


def test_auto_compiles_nothing_on_a_cpu(tiny: Any, tmp_path: Path, small: Path) -> None:
    torch._dynamo.utils.counters.clear()
    assert tiny.start("lora.yaml", tmp_path / "run", base=small, **QUIET) == 0
    assert not torch._dynamo.utils.counters["stats"]
    assert not any("compile" in text for _, text in read(tmp_path / "run/metrics.jsonl").events)


def test_a_method_with_a_step_of_its_own_cannot_be(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.start("embedded/1_autoencoder.yaml", tmp_path / "run", train__compile="on") == 2
    assert "train.compile: found on, but method" in capsys.readouterr().err
