"""Users' mistakes: exit code 2, one clear text, no traceback, and nothing left behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

CONTROLNET, LORA = "controlnet_canny.yaml", "lora.yaml"
INVERSION = "textual_inversion.yaml"
AUTOENCODER, CLIP, FULL = "embedded/1_autoencoder.yaml", "embedded/2_clip.yaml", "embedded/4_unet_128.yaml"

CASES: list[tuple[str, str, dict[str, Any], str]] = [
    ("no base", LORA, {"base": "nowhere"}, "base.path: nowhere: no such folder"),
    ("no data", LORA, {"data.source": "nowhere/data"}, "nowhere/data: no such folder, and no prepare.py"),
    ("no heldout data", LORA, {"data.heldout": "nowhere/data"}, "nowhere/data: no such folder"),
    (
        "batch",
        LORA,
        {"train.batch_size": 9},
        "train.batch_size: 9 pictures in a batch, but an epoch has only 8",
    ),
    (
        "division",
        LORA,
        {"train.batch_size": 5, "train.accumulate": 2},
        "train.batch_size: found 5, which 1 process x 2 (train.accumulate) = 2 forward passes cannot share "
        "evenly; choose 4 or 6",
    ),
    (
        "no token in captions",
        INVERSION,
        {"method.textual_inversion.replace": None},
        "captions lack the token that is to be learned",
    ),
    (
        "a token that no caption has",
        INVERSION,
        {
            "method.textual_inversion.token": None,
            "method.textual_inversion.init": ...,
            "method.textual_inversion.replace": ...,
            "method.textual_inversion": "{tokens: [{token: <a>, init: toy, replace: thing}, {token: <b>, "
            "init: toy}]}",
        },
        "no caption has <b>, so that it would learn nothing",
    ),
    (
        "templates twice",
        INVERSION,
        {"method.textual_inversion.templates": "object", "data.captions.templates": "['a {}']"},
        "data.captions.templates: found together with the method's templates; give one",
    ),
    (
        "kept norms and averaged weights",
        INVERSION,
        {"method.textual_inversion.norm": "kept", "train.optimiser": "adamwschedulefree"},
        "train.optimiser: adamwschedulefree has weights of its own beside the trained ones",
    ),
    (
        "a dot in a bundle",
        INVERSION,
        {"method.textual_inversion.token": "<a.b>", "method.lora.rank": 2},
        "token <a.b>: a dot cannot stand in the name of a word that lies in a bundle",
    ),
    (
        "init of several tokens",
        INVERSION,
        {"method.textual_inversion.init": "thing"},
        "method.textual_inversion.init: 'thing' is 5 tokens of the base, expected one",
    ),
    (
        "known token",
        INVERSION,
        {"method.textual_inversion.token": "red</w>"},
        "the token red</w> is in the base's vocabulary already; choose another",
    ),
    (
        "fresh component that is not loaded",
        LORA,
        {"base.new": "[image_encoder]"},
        "base.new: image_encoder has no effect: this run loads text_encoder, unet, vae only",
    ),
    (
        "revision of a folder",
        LORA,
        {"base.revision": "main"},
        "base.revision: main has no effect",
    ),
    (
        "objective of an autoencoder",
        AUTOENCODER,
        {"objective.loss": "huber"},
        "objective: method autoencoder has a loss of its own, so these keys have no effect",
    ),
    (
        "captions of an autoencoder",
        AUTOENCODER,
        {"data.captions.drop": "0.1"},
        "data.captions: method autoencoder reads no captions, so these keys have no effect",
    ),
    (
        "previews of an autoencoder",
        AUTOENCODER,
        {"preview.every": 1},
        "preview.every: method autoencoder makes no pictures from prompts; set 0",
    ),
    (
        "previews and measures of a CLIP pair",
        CLIP,
        {"preview.every": 1, "evaluate.samples": 2},
        "preview.every: method contrastive makes no pictures from prompts; set 0\n"
        "evaluate.samples: there are no measures for method contrastive; set 0",
    ),
    (
        "measures of a whole base",
        FULL,
        {"evaluate.samples": 2},
        "evaluate.samples: there are no measures for method full; set 0",
    ),
    (
        "measures without held-out samples",
        LORA,
        {"data.heldout": "[]", "validate.every": 0},
        "evaluate.samples: found the number 2, which needs held-out samples",
    ),
    (
        "conditions without held-out samples",
        CONTROLNET,
        {"data.heldout": "[]", "validate.every": 0, "evaluate.samples": 0},
        "preview.every: the conditions of previews come from held-out samples: set data.heldout, or 0 here",
    ),
    (
        "previews of nothing",
        LORA,
        {"data.heldout": "[]", "validate.every": 0, "evaluate.samples": 0},
        "preview.every: there is nothing to show: set preview.prompts or data.heldout",
    ),
    ("optimiser", LORA, {"train.optimiser": "adamv"}, "adamv"),
    (
        "the optimiser's option",
        LORA,
        {"train.optimiser": "{name: sgd, betas: [0.5, 0.9]}"},
        "SGD does not take betas",
    ),
    ("resume", LORA, {"train.resume": "nowhere"}, "train.resume: nowhere: no whole checkpoint there"),
    ("timesteps", LORA, {"objective.timesteps": "[0, 5000]"}, "objective: "),
    ("resolution", LORA, {"data.resolution": 60}, "data.resolution: 60 is no multiple of 8"),
    (
        "resolution of an image encoder",
        CLIP,
        {"data.resolution": 64},
        "data.resolution: 64, but the base's image encoder takes 32 pixels only",
    ),
]


def assert_told(code: int, capsys: pytest.CaptureFixture[str], output: Path, expected: str) -> None:
    told = capsys.readouterr().err
    assert code == 2, told
    assert expected in told
    assert "Traceback" not in told
    assert not output.exists()


@pytest.mark.parametrize("name, recipe, changes, expected", CASES, ids=[case[0] for case in CASES])
def test_a_mistake_is_told(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    recipe: str,
    changes: dict[str, Any],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_told(tiny.start(recipe, tmp_path / "out", **changes), capsys, tmp_path / "out", expected)


@pytest.mark.parametrize("damage", ["truncated", "text"])
@pytest.mark.parametrize("cache", ["cached", "off"])
def test_an_unreadable_picture_is_named(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, cache: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny.shapes / "style", data)
    picture = data / "000003.png"
    picture.write_bytes(picture.read_bytes()[:200] if damage == "truncated" else b"no picture at all")
    more = {"data.source": data, "preview.every": 0}
    more |= {"data.cache": "off"} if cache == "off" else {}
    code = tiny.start(LORA, tmp_path / "out", **more)
    told = capsys.readouterr().err
    assert code == 2 and str(picture) in told and "Traceback" not in told, told
    # Each is read before anything is written, whether it is encoded for a cache or not.
    assert not (tmp_path / "out").exists()


def test_a_damaged_component_is_named(
    tiny: Any, sd1_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    (base / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    assert_told(tiny.start(LORA, tmp_path / "out", base=base), capsys, tmp_path / "out", "vae")


def test_an_output_that_is_a_file(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("mine")
    code = tiny.start(LORA, tmp_path / "taken")
    told = capsys.readouterr().err
    assert code == 2 and "taken" in told and "Traceback" not in told
    assert (tmp_path / "taken").read_text() == "mine"
