"""A run that cannot start tells everything that keeps it from starting, not only what it met first."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuner import loop
from tuner.check import others as looking
from tuner.check.findings import Findings, Problem
from tuner.check.others import further, others

LORA = "lora.yaml"
Digests = Callable[[Path], dict[str, str]]


def test_a_run_tells_all_mistakes_once(
    tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], digests: Digests
) -> None:
    base, data, output = tmp_path / "base", tmp_path / "data", tmp_path / "out"
    shutil.copytree(tiny.base, base)
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.copytree(tiny.shapes / "style", data)
    (data / "000002.png").write_bytes(b"no picture")
    (data / "000004.png").write_bytes(b"")
    before = digests(tmp_path)
    changes: dict[str, Any] = {"base": base, "data.source": data, "data.heldout": tmp_path / "nowhere"}
    changes |= {"train.optimiser": "adamv", "data.cache": tmp_path / "cache"}
    assert tiny.start(LORA, output, **changes) == 2
    told = capfd.readouterr().err
    first, *rest = told.splitlines()
    # What the run met, in its words; a check's words for the same are left out.
    assert str(base) in first and "unet" in first and told.count("unet") == first.count("unet")
    assert rest[0] == "5 more problems, found by looking at the rest:" and "Traceback" not in told
    for number, text in enumerate(
        (
            "000002.png: this picture cannot be read",
            "000004.png: this picture cannot be read: the file is empty (0 bytes)",
            "2 of 8 samples cannot be used",
            "nowhere: no such folder",
            "train.optimiser: unknown optimiser 'adamv'",
        )
    ):
        assert sum(text in line for line in rest) == 1, (number, text, told)
    after = {name: value for name, value in digests(tmp_path).items() if not name.startswith("cache/")}
    assert after == before and not output.exists()


def test_a_run_with_one_mistake_says_no_more(tiny: Any, tmp_path: Path, capfd: Any) -> None:
    assert tiny.start(LORA, tmp_path / "out", **{"data.source": tmp_path / "nowhere"}) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_a_run_that_had_begun_is_not_looked_at_again(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> bool:
        raise loop.TrainingError("step 3: gone wrong")

    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.setattr(looking, "others", lambda *_: pytest.fail("it had begun"))
    assert tiny.start(LORA, tmp_path / "out") == 2
    assert capfd.readouterr().err == "step 3: gone wrong\n"


BASE, UNET = Problem("base", "base/vae: is missing"), Problem("base", "base/unet: is cut off")
DATA, PLAN = Problem("data", "a.png: is empty"), Problem("plan", "train.batch_size: 9 is too large")
KEY, MEMORY = Problem("data", "data.crop: found 1"), Problem("memory", "the run needs 9 GiB\n1 is there")


@pytest.mark.parametrize(
    "problems, told, rest",
    [
        ([BASE, UNET, DATA], "base/vae: is missing", [UNET, DATA]),  # in a run's words
        ([BASE, UNET, DATA], "the component vae is missing", [DATA]),  # in others: it may be any of a kind
        ([DATA, PLAN], "a.png: is empty\n1 of 4 cannot be used", []),  # what may follow from it
        ([BASE, PLAN], "base/vae: is missing", [PLAN]),
        ([BASE, KEY], "data.crop: found 1, and more", [BASE]),
        ([BASE, MEMORY], "memory: about 9 GiB", [BASE]),
        ([], "anything", []),
    ],
)
def test_what_was_not_told_yet(problems: list[Problem], told: str, rest: list[Problem]) -> None:
    assert further(problems, told) == rest


def test_it_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found until then is told."""

    def slow(recipe: Any, wish: Any, found: Findings) -> None:
        found.problem("base", BASE.text)
        found.problem("data", DATA.text)
        time.sleep(60)

    monkeypatch.setattr(looking, "every", slow)
    monkeypatch.setattr(looking, "LONGEST", 0.2)
    began, recipe = time.monotonic(), object()
    assert others(recipe, BASE.text) == [  # type: ignore[arg-type]
        "1 more problem at least, found by looking at the rest:",
        "  a.png: is empty",
    ]
    assert time.monotonic() - began < 30
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert others(recipe, BASE.text) == []  # type: ignore[arg-type]


def test_a_fault_of_the_looking_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(recipe: Any, wish: Any, found: Findings) -> None:
        found.problems_of("data", [f"{number}.png: is empty" for number in range(20)])
        raise ZeroDivisionError

    monkeypatch.setattr(looking, "every", wrong)
    lines = others(object(), "0.png: is empty")  # type: ignore[arg-type]
    assert lines[0].startswith("19 more problems at least") and len(lines) == looking.SHOWN + 2
    assert lines[-1] == "  ... and 11 more; see tuner check"
