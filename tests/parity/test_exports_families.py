"""The exports of every family, read back by the libraries that users have."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tuner import verify
from tuner.export.files import load, save
from tuner.methods.textual_inversion import Config, TextualInversion
from tuner.objective import Objective
from tuner.task import Task
from tuner.verify import together

BASES = ("sd2", "sdxl", "sd1_inpaint", "sdxl_inpaint")  # sd1: test_exports.py


@pytest.mark.parametrize("name", ["controlnet", "textual_inversion"])
@pytest.mark.parametrize("base", BASES)
def test_an_export_has_the_trained_effect(
    base: str, name: str, folders: dict[str, Path], tmp_path: Path, models: ModuleType
) -> None:
    family: Any = models.family_of(folders[base], name)
    method = models.move(models.method_of(name, family))
    card = models.card_of(torch.float16, method)
    files = method.export(family, tmp_path, card)
    lines = verify.check(family, [method], files, card)
    assert len(lines) == len(files) == {"controlnet": 2, "textual_inversion": 1}[name]
    if name == "controlnet":
        assert (tmp_path / f"control_{family.version}_case.safetensors").is_file()
        only_folder = "from the folder only" in lines[1]
        assert only_folder == (family.name == "sdxl") and only_folder != ("own converter" in lines[1])


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_words_and_a_lora_are_proved_apart_and_together(
    base: str, several: bool, folders: dict[str, Path], tmp_path: Path, models: ModuleType
) -> None:
    family: Any = models.family_of(folders[base], "textual_inversion", "lora")
    tokens = [{"token": "<new>", "init": "red"}, {"token": "<toy>", "init": "toy", "vectors": 2}]
    word = TextualInversion(
        Config(**({"tokens": tokens} if several else models.CONFIGS["textual_inversion"])), family, 3
    )
    lora = models.method_of("lora", family)
    for method in (word, lora):
        models.move(method)
    card = models.card_of(torch.float16, word, lora)
    task = Task(family, [lora, word], Objective.from_scheduler_config(family.scheduler_config))
    written = task.export(tmp_path, card)
    places = [path.relative_to(tmp_path).as_posix() for path in written]
    names = ["new.safetensors", "toy.safetensors"] if several else ["toy.safetensors"]
    assert places == ["case.safetensors", *names, "bundle/case.safetensors"]
    lines = verify.check(family, task.each(), written, card)
    assert [line.partition(":")[0] for line in lines] == places
    assert f"those of {len(names) + 1} files" in lines[-1] and "loaded together" in lines[-1]
    tensors, _ = load(written[-1])
    vectors = {key: len(tensor) for key, tensor in tensors.items() if key.startswith("bundle_emb.")}
    parts = ["clip_l", "clip_g"] if base == "sdxl" else ["string_to_param.*"]
    count = {"new": 1, "toy": 2} if several else {"toy": 3}
    assert vectors == {f"bundle_emb.{name}.{part}": n for name, n in count.items() for part in parts}
    assert len(tensors) - len(vectors) == len(load(written[0])[0]) > 100


def test_a_wrong_word_in_a_bundle_is_named(sd1_folder: Path, tmp_path: Path, models: ModuleType) -> None:
    family: Any = models.family_of(sd1_folder, "textual_inversion", "lora")
    methods = [models.move(models.method_of(name, family)) for name in ("textual_inversion", "lora")]
    card = models.card_of(torch.float16, *methods)
    task = Task(family, methods, Objective.from_scheduler_config(family.scheduler_config))
    written = task.export(tmp_path, card)
    tensors, metadata = load(written[-1])
    tensors["bundle_emb.toy.string_to_param.*"] *= 2
    save(written[-1], tensors, metadata)
    with pytest.raises(verify.VerifyError, match="bundle/case.safetensors: bundle_emb.toy.string_to_param"):
        verify.check(family, methods, written, card)


def test_files_that_do_not_work_together_are_an_error(
    sd1_folder: Path, tmp_path: Path, models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    family: Any = models.family_of(sd1_folder, "textual_inversion", "lora")
    methods = [models.move(models.method_of(name, family)) for name in ("textual_inversion", "lora")]
    card = models.card_of(torch.float16, *methods)
    task = Task(family, methods, Objective.from_scheduler_config(family.scheduler_config))
    written = task.export(tmp_path, card)

    def negative(pipe: Any, path: Path, token: str, rows: dict[str, torch.Tensor]) -> None:
        pipe.load_textual_inversion({token: -rows["text_encoder"]})

    monkeypatch.setattr(together, "load_word", negative)
    with pytest.raises(verify.VerifyError, match="the files loaded together: the encoded prompt"):
        verify.check(family, methods, written, card)
