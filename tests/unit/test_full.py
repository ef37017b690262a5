"""Full training: which parts are trained, and what of the whole model is written."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from tuner import base, verify
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.export import files, original
from tuner.family import Options
from tuner.methods.full import Config, Full
from tuner.verify import VerifyError

PARTS = {"sd1": ["text_encoder"], "sd2": ["text_encoder"], "sdxl": ["text_encoder", "text_encoder_2"]}


@pytest.mark.parametrize(
    "config, message",
    [
        ({"unet": False}, "unet: found false, as text_encoder: expected one of them true"),
        ({"text_encoder_learning_rate": 1e-5}, "text_encoder_learning_rate: has no effect"),
        ({"prior": {"prompt": "a toy", "source": "x", "count": 3}}, "count: has no effect"),
        ({"prior": {}}, "prompt"),
        ({"prior": {"prompt": "a", "weight": 0.0}}, "greater than 0"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        Config(**config)


@pytest.mark.parametrize("name", PARTS)
def test_what_the_denoiser_is_not_told_of_is_not_trained(
    name: str, folders: dict[str, Path], models: ModuleType
) -> None:
    family = models.family_of(folders[name], "full")
    method = models.method_of("full", family, unet=False, text_encoder=True)
    assert list(method.networks()) == PARTS[name] and not hasattr(method, "denoiser")
    every = {f"text_encoders.{n}" for n, _ in method.text_encoders.named_parameters()}
    frozen = every - method.trained().keys()
    # Only SDXL's first encoder is read before its last layer, and without its last normalisation.
    unread = ("text_encoders.text_encoder.encoder.layers.2.", "text_encoders.text_encoder.final_layer_norm.")
    assert frozen == {n for n in every if n.startswith(unread) and name == "sdxl"}
    assert len(frozen) == (18 if name == "sdxl" else 0) and len(method.trained()) > 30
    assert not any(p.requires_grad for p in family.denoiser.parameters())
    groups = method.groups(1.0)
    assert len(groups) == 1 and groups[0]["lr"] == 1.0
    own = models.method_of(
        "full", models.family_of(folders[name], "full"), text_encoder=True, text_encoder_learning_rate=0.1
    )
    assert [group.get("lr") for group in own.groups(1.0)] == [None, 0.1]


def test_clip_skip_leaves_the_layers_behind_alone(sd1_folder: Path, tmp_path: Path) -> None:
    family = base.load(str(sd1_folder), None, (), Full.NEEDS, 0, Hashes(tmp_path), Options(clip_skip=2))
    method = Full(Config(text_encoder=True), family, 0)
    frozen = {n for n, p in method.text_encoders.named_parameters() if not p.requires_grad}
    assert len(frozen) == 16 and all(".encoder.layers.1." in name for name in frozen)


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("name", [*PARTS, "sd1_inpaint"])
def test_the_whole_model_is_written_and_proved(
    name: str, text_encoder: bool, folders: dict[str, Path], tmp_path: Path, models: ModuleType
) -> None:
    family = models.family_of(folders[name], "full")
    method = models.move(models.method_of("full", family, text_encoder=text_encoder))
    card = models.card_of(torch.float16, method)
    # In memory the rest is held in bfloat16: the file has it as the base's own file does.
    family.cast(torch.bfloat16, method.parameters())
    written = method.export(family, tmp_path, card)
    trained = ["unet", *(PARTS[family.name] if text_encoder else [])]
    places = [path.relative_to(tmp_path).as_posix() for path in written]
    assert [place.split("/")[1] for place in places[:-1]] == trained and places[-1] == "case.safetensors"
    lines = verify.check(family, [method], written, card)
    assert len(lines) == len(trained) + 1 and f"read back as {family.name}" in lines[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["case.safetensors", "diffusers"]

    plain = models.family_of(folders[name], "full")
    before = {n: module.state_dict() for n, module in plain.modules().items()}
    configs = {
        n: m.config.to_dict() if n.startswith("text") else m.config for n, m in plain.modules().items()
    }
    states = original.from_original(files.load(written[-1])[0], configs, family.name)
    assert states.keys() == before.keys() == original.PLACES[family.name].keys()
    for component, state in states.items():
        assert all(tensor.dtype == torch.float16 for tensor in state.values())
        same = [torch.equal(state[key], before[component][key].half()) for key in before[component]]
        assert len(same) > 20 and all(same) == (component not in trained)


def test_the_file_can_be_left_out(sd1_folder: Path, tmp_path: Path, models: ModuleType) -> None:
    family = models.family_of(sd1_folder, "full")
    method = models.method_of("full", family, checkpoint_file=False)
    (path,) = method.export(family, tmp_path, models.card_of(torch.float16, method))
    assert path == tmp_path / "diffusers/unet/diffusion_pytorch_model.safetensors"


def test_a_base_without_a_place_in_the_layout_is_told_before_training(
    sd1_folder: Path, models: ModuleType
) -> None:
    family = models.family_of(sd1_folder, "full")
    family.denoiser.register_to_config(layers_per_block=(1, 1))
    with pytest.raises(
        UserError, match="method.full.checkpoint_file: layers_per_block is .* set it to false"
    ):
        models.method_of("full", family)
    models.method_of("full", family, checkpoint_file=False)


def drop(tensors: dict[str, Tensor]) -> None:
    tensors.pop("first_stage_model.quant_conv.bias")


def change(tensors: dict[str, Tensor]) -> None:
    tensors["cond_stage_model.transformer.text_model.final_layer_norm.weight"] *= 2


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop, "1 missing (first_stage_model.quant_conv.bias)"),
        (change, "final_layer_norm.weight is not what"),
    ],
)
def test_a_damaged_file_is_named(
    damage: Any, message: str, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    family = models.family_of(sd1_folder, "full")
    method = models.method_of("full", family)
    card = models.card_of(torch.float16, method)
    written = method.export(family, tmp_path, card)
    tensors, metadata = files.load(written[-1])
    damage(tensors)
    files.save(written[-1], tensors, metadata)
    with pytest.raises(VerifyError, match=re.escape(message)):
        verify.check(family, [method], written, card)


def test_the_files_effect_is_compared_beside_its_tensors(
    sd1_folder: Path, tmp_path: Path, models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.verify import full as check

    family = models.family_of(sd1_folder, "full")
    method = models.method_of("full", family, text_encoder=True)
    card = models.card_of(torch.float16, method)
    written = method.export(family, tmp_path, card)
    real, keys = (
        check.same_tensors,
        ("text_model.final_layer_norm.weight", "model.diffusion_model.out.2.weight"),
    )
    for ending, component, message in (
        (keys[0], "text_encoder", "the prompt differs"),
        (keys[1], "unet", "the prediction differs"),
    ):
        tensors, metadata = files.load(written[-1])
        (key,) = (name for name in tensors if name.endswith(ending))
        files.save(written[-1], {**tensors, key: 2 * tensors[key]}, metadata)
        monkeypatch.setattr(
            check, "same_tensors", lambda where, *more: real(where, *more) if "back" in where else 1
        )
        with pytest.raises(VerifyError, match=f"read back: {component}: .* is not what was trained"):
            verify.check(family, [method], written, card)
        monkeypatch.setattr(check, "same_tensors", lambda *_: 1)
        with pytest.raises(VerifyError, match=f"case.safetensors: {message}"):
            verify.check(family, [method], written, card)
        files.save(written[-1], tensors, metadata)
    tensors.pop("model.diffusion_model.out.2.bias")
    files.save(written[-1], tensors, metadata)
    with pytest.raises(VerifyError, match="case.safetensors is not read back"):
        verify.check(family, [method], written, card)
