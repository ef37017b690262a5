"""Whole runs whose captions are changed by every operator, and those that are stopped because of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LORA, INVERSION = "lora.yaml", "textual_inversion.yaml"
TAGS = "data.captions.tags"
FEW = {"preview.every": 0, "validate.every": 0, "evaluate.samples": 0, "data.heldout": "[]", "train.steps": 2}


@pytest.mark.parametrize("most", [1, 10**6], ids=["cached in part", "cached"])
def test_a_run_with_every_operator(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("tuner.data.captions.MANY", most)
    more = {
        "data.captions.choose": "[3, 1]",
        "data.captions.wildcards": "true",
        "data.captions.trigger": "toy",
        "data.captions.suffix": "', seen'",
        "data.captions.templates": "['a {}', 'the {}']",
        TAGS: "{separator: ' and ', shuffle: true, drop: 0.2}",
    }
    assert tiny.start(LORA, tmp_path / "out", **FEW, **more) == 0
    said = capsys.readouterr()
    assert ("too many to keep encoded" in said.out + said.err) == (most == 1)
    assert any((tmp_path / "out" / "export").iterdir())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({TAGS: "{drop: 0.1, separator: ' '}"}, "captions lack the token that is to be learned"),
        (
            {"data.captions.prefix": f"'{'red ' * 80}'"},
            "captions are cut before the token that is to be learned",
        ),
        (
            {"data.captions.choose": "{poem: 1}"},
            "expected a caption of kind poem, found",
        ),
    ],
)
def test_captions_that_teach_nothing(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], expected: str
) -> None:
    assert tiny.start(INVERSION, tmp_path / "out", **FEW, **changes) == 2
    told = capsys.readouterr().err
    assert expected in told and "Traceback" not in told and not (tmp_path / "out").exists()
