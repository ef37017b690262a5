"""What all tests share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

# The same examples in every run, and no time limit for one: machines are busy.
settings.register_profile("tuner", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tuner")


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """tests/models.py, for tests that want another model than the shared one."""
    return _load("models")


def _load(name: str) -> ModuleType:
    """A file of tests/ as a module; it can import (from .part) what lies in the folder of its name."""
    place = Path(__file__).with_name(f"{name}.py")
    parts = [str(place.with_suffix(""))]
    spec = importlib.util.spec_from_file_location(
        f"tuner_test_{name}", place, submodule_search_locations=parts
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _unplanned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's memory is planned only in tests marked `plans_memory`: it takes as long as a tiny run does."""
    if request.node.get_closest_marker("plans_memory") is None:
        monkeypatch.setattr("tuner.memory.admit", lambda recipe, accelerator: None)


@pytest.fixture(scope="session")
def captioners() -> ModuleType:
    """tests/captioners.py: tiny models that write captions, and that match them."""
    return _load("captioners")


@pytest.fixture
def hub() -> Iterator[Any]:
    """A Hub of its own for each test, on 127.0.0.1: a tests/hub.py Hub."""
    with _load("hub").Hub() as made:
        yield made


def _base(name: str, maker: str, **more: Any) -> Any:
    """A fixture: a tiny random base in diffusers layout, made by tests/models.py; only to be read."""

    @pytest.fixture(scope="session")
    def folder(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
        made: Path = getattr(models, maker)(tmp_path_factory.mktemp("base") / name, **more)
        return made

    return folder


sd1_folder = _base("tiny-sd1", "tiny_sd1")
sd2_folder = _base("tiny-sd2", "tiny_sd2")  # with v-prediction
sdxl_folder = _base("tiny-sdxl", "tiny_sdxl")
sd1_inpaint_folder = _base("tiny-sd1-inpaint", "tiny_sd1", in_channels=9)
sdxl_inpaint_folder = _base("tiny-sdxl-inpaint", "tiny_sdxl", in_channels=9)


@pytest.fixture(scope="session")
def folders(
    sd1_folder: Path, sd2_folder: Path, sdxl_folder: Path, sd1_inpaint_folder: Path, sdxl_inpaint_folder: Path
) -> dict[str, Path]:
    """A tiny base of every family, inpainting variants too; only to be read."""
    return {
        "sd1": sd1_folder,
        "sd2": sd2_folder,
        "sdxl": sdxl_folder,
        "sd1_inpaint": sd1_inpaint_folder,
        "sdxl_inpaint": sdxl_inpaint_folder,
    }


@pytest.fixture(scope="session")
def adapters() -> ModuleType:
    """tests/adapters.py: adapters on the tiny bases, and what diffusers makes of their files."""
    place = Path(__file__).with_name("adapters.py")
    spec = importlib.util.spec_from_file_location("tuner_test_adapters", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
