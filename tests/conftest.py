"""What all tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

# The same examples in every run, and no time limit for one: machines are busy.
settings.register_profile("tuner", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tuner")


@pytest.fixture(scope="session")
def models() -> ModuleType:
    """tests/models.py, for tests that want another model than the shared one."""
    place = Path(__file__).with_name("models.py")
    spec = importlib.util.spec_from_file_location("tuner_test_models", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def sd1_folder(models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Stable Diffusion 1.x in diffusers layout; shared, so only to be read."""
    folder: Path = models.tiny_sd1(tmp_path_factory.mktemp("base") / "tiny-sd1")
    return folder
