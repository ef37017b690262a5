"""Checkpoints in one file where file tools and bases take folders, and what they were trained to predict."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tuner import single_file
from tuner.export import adapter, files, kohya, lycoris, peft_format
from tuner.export.kohya import LoraModule
from tuner.files import bases

Run = Callable[..., tuple[int, str, str]]


def queries(base: Any, adapters: ModuleType, **more: Any) -> dict[str, LoraModule]:
    """A LoRA on the UNet's query projections."""
    made: dict[str, LoraModule] = adapters.loras(base, only=lambda p: p.endswith("attn1.to_q"), **more)
    assert len(made) > 4
    return made


@pytest.fixture
def checkpoint(
    states: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Writes a tiny base as one file; the shipped configurations are those of the tiny bases."""
    (tmp_path / "configs").mkdir()
    for name, kind in (("sd15", "sd1"), ("sd21", "sd2"), ("sd21-base", "sd2"), ("sdxl", "sdxl")):
        (tmp_path / "configs" / name).symlink_to(folders[kind], target_is_directory=True)
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(kind: str, name: str = "one", changes: Any = None) -> Path:
        return files.save(tmp_path / f"{name}.safetensors", states[kind] | (changes or {}), {"a": "b"})

    return write


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_merge_into_a_checkpoint(
    kind: str,
    checkpoint: Any,
    run: Run,
    folders: dict[str, Path],
    tmp_path: Path,
    adapters: ModuleType,
) -> None:
    base = bases.named(str(folders[kind]))
    wanted = [p for p in base.adaptable() if p.endswith(("attn1.to_q", "self_attn.q_proj", "mlp.fc1"))]
    modules = adapters.loras(base, only=wanted.__contains__)
    tensors = kohya.to_kohya(modules, kohya.naming(base.family, base.unet))
    lora = files.save(tmp_path / "lora.safetensors", tensors, {})
    source = checkpoint(kind)
    one, whole, plain = tmp_path / "merged.safetensors", tmp_path / "folder", tmp_path / "plain"
    for into, out in ((source, one), (source, whole), (folders[kind], plain)):
        code, lines, err = run("merge", "--lora", f"{lora}:0.5", "--into", into, "--out", out)
        assert code == 0, err
        assert f"{len(modules)} weights of" in lines
    read = single_file.as_folder(one, tmp_path / "cache")
    changed = 0
    for part in sorted({path.partition(".")[0] for path in modules}):
        from_file, of_folder, before = (bases.weights(place / part) for place in (read, plain, folders[kind]))
        assert from_file.keys() == of_folder.keys()
        for key, tensor in of_folder.items():
            assert torch.equal(from_file[key], tensor) and torch.equal(
                bases.weights(whole / part)[key], tensor
            )
            changed += not torch.equal(tensor, before[key])
    assert changed == len(modules) > 10
    (before, _), (after, told) = files.load(source), files.load(one)
    assert before.keys() == after.keys() and told["a"] == "b"
    assert told["tuner.derived"] == "merge of 0.5 x lora into one"
    same = sum(
        torch.equal(before[key], after[key]) and before[key].shape == after[key].shape for key in before
    )
    touched = {path for path in modules if not path.endswith("q_proj")}
    # OpenCLIP's query, key and value are one tensor
    assert len(before) - same == len(touched) + sum(p.endswith("q_proj") for p in modules)
    code, _, err = run("merge", "--lora", lora, "--into", folders[kind], "--out", tmp_path / "y.safetensors")
    assert code == 2 and "is no checkpoint in one file" in err


def test_extract_and_convert_with_checkpoints(
    checkpoint: Any, run: Run, states: Any, folders: dict[str, Path], tmp_path: Path, adapters: ModuleType
) -> None:
    key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    source = checkpoint("sd1")
    tuned = checkpoint("sd1", "tuned", {key: states["sd1"][key] + torch.ones_like(states["sd1"][key])})
    out = tmp_path / "x.safetensors"
    code, lines, err = run("extract", source, tuned, "--rank", 1, "--out", out)
    assert code == 0 and "tuned.safetensors - one.safetensors" in lines, err
    assert files.load(out)[1]["tuner.derived"] == "extract rank 1 of tuned - one"
    found = adapter.read(*files.load(out), bases.named(str(source))).loras("this")
    (place,) = found
    shape = bases.named(str(folders["sd1"])).layers()[place]
    torch.testing.assert_close(lycoris.change(found[place], shape), torch.ones(shape, dtype=torch.float64))

    base = bases.named(str(source))
    assert base.name == "one" and base.family == "sd1"
    modules = queries(base, adapters)
    tensors, told = peft_format.to_peft(modules, {p: torch.rand(m.up.shape[0]) for p, m in modules.items()})
    dora = files.save(tmp_path / "dora.safetensors", tensors, told)
    baked = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    for given, path in zip((source, folders["sd1"]), baked, strict=True):
        code, _, err = run("convert", dora, "--to", "comfy", "--out", path, "--base", given)
        assert code == 0, err
    one, other = (files.load(path)[0] for path in baked)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    code, _, err = run("convert", dora, "--to", "comfy", "--out", tmp_path / "z", "--base", dora)
    assert code == 2 and "is a LoRA (or LoHa, LoKr); expected a Stable Diffusion checkpoint" in err


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_checkpoints_prediction_can_be_given(
    kind: str, checkpoint: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    from tuner import base
    from tuner.data.cache import Hashes
    from tuner.family import Options

    source, hashes = checkpoint(kind), Hashes(tmp_path / "cache")
    for given, wanted in ((None, "v_prediction"), ("epsilon", "epsilon"), ("v_prediction", "v_prediction")):
        family = base.load(str(source), None, (), ("unet",), 0, hashes, Options(prediction=given))  # type: ignore[arg-type]
        if given is None:  # no bias that tells: sd2 as its 768-pixel models have it
            wanted = "epsilon" if kind == "sd1" else "v_prediction"
        assert family.scheduler_config["prediction_type"] == wanted
    for place in (str(folders[kind]), "embedded", "owner/name"):
        with pytest.raises(
            ValueError, match=f"base.prediction: epsilon has no effect: {re.escape(place)} is no"
        ):
            base.load(place, None, (), ("unet",), 0, hashes, Options(prediction="epsilon"))


def test_sampling_with_another_prediction(checkpoint: Any, run: Run, tmp_path: Path) -> None:
    source = checkpoint("sd2")
    fast = ("--prompt", "a", "--size", "64x64", "--steps", "2", "--precision", "fp32")
    made = {}
    for given in ("", "epsilon", "v_prediction"):
        more = ("--prediction", given) if given else ()
        code, out, err = run("sample", "--base", source, *more, *fast, "--out", tmp_path / f"x{given}")
        assert code == 0 and f"(sd2, {given or 'v_prediction'})" in out, err
        made[given] = (tmp_path / f"x{given}" / "prompt01-seed0.png").read_bytes()
    assert made[""] == made["v_prediction"] != made["epsilon"]
    code, _, err = run("sample", "--base", source, "--prediction", "v", *fast, "--out", tmp_path / "y")
    assert code == 2 and "prediction v: expected epsilon or v_prediction" in err
