"""Conditions by a transformers model: tiny random ones, made here, compared with the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

from tuner.data.conditions import Condition, Draw, make_condition
from tuner.data.conditions._palettes import ade, voc
from tuner.data.conditions.model import colours
from tuner.data.pictures import Picture
from tuner.errors import UserError

SIDE = 32


def processor(folder: Path, **more: Any) -> None:
    config = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config | more))


def depth_model(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GLPNConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
    )
    transformers.GLPNForDepthEstimation(config).save_pretrained(folder)
    processor(folder)
    return folder


def segmentation_model(folder: Path, classes: int) -> Path:
    torch.manual_seed(1)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        num_labels=classes,
    )
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    processor(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("annotators")
    return {
        "depth": depth_model(place / "depth"),
        "ade": segmentation_model(place / "ade", 150),
        "few": segmentation_model(place / "few", 5),
    }


def picture(height: int = 40, width: int = 56) -> Picture:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)


def made(tree: dict[str, Any], name: str = "a.png") -> Picture:
    return make_condition(Condition.model_validate({"kind": "model", **tree}), picture(), Draw(), name)


def inputs() -> dict[str, torch.Tensor]:
    """The picture as the models take it, without the library's processor."""
    from PIL import Image

    small = Image.fromarray(picture()).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.asarray(small, np.float32)).permute(2, 0, 1)[None]
    return {"pixel_values": (values / 255 - 0.5) / 0.5}


def test_depth_is_the_models_scaled_to_the_picture(models: dict[str, Path]) -> None:
    network = transformers.GLPNForDepthEstimation.from_pretrained(models["depth"]).eval()
    with torch.inference_mode():
        raw = network(**inputs()).predicted_depth
    grown = functional.interpolate(raw[:, None], (40, 56), mode="bicubic", align_corners=False)[0, 0]
    wanted = ((grown - grown.min()) / (grown.max() - grown.min()) * 255).numpy()
    out = made({"path": str(models["depth"]), "task": "depth"})
    assert out.shape == (40, 56, 3) and (out == out[:, :, :1]).all()
    assert (int(out.min()), int(out.max())) == (0, 255)
    assert np.abs(out[:, :, 0] - wanted).max() <= 1
    turned = made({"path": str(models["depth"]), "task": "depth", "distance": True})
    assert np.abs(255 - turned.astype(int) - out).max() <= 1


def test_segments_have_the_palettes_colours(models: dict[str, Path]) -> None:
    network = transformers.SegformerForSemanticSegmentation.from_pretrained(models["ade"]).eval()
    with torch.inference_mode():
        logits = network(**inputs()).logits
    grown = functional.interpolate(logits, (40, 56), mode="bilinear", align_corners=False)[0]
    out = made({"path": str(models["ade"]), "task": "segmentation"})
    assert out.shape == (40, 56, 3) and out.dtype == np.uint8
    wanted = ade()[grown.argmax(dim=0).numpy()]
    assert (out == wanted).all(axis=2).mean() > 0.99 and len(np.unique(out.reshape(-1, 3), axis=0)) > 1
    few = made({"path": str(models["few"]), "task": "segmentation", "palette": "voc"})
    found = {tuple(colour) for colour in few.reshape(-1, 3).tolist()}
    assert found <= {tuple(colour) for colour in voc(5).tolist()}


def test_palettes() -> None:
    assert ade().shape == (150, 3)
    assert ade()[:4].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230], [80, 50, 50]]
    assert ade()[[20, 99, 149]].tolist() == [[0, 102, 200], [255, 112, 0], [92, 0, 255]]
    assert len({tuple(colour) for colour in ade().tolist()}) == 149  # road is skyscraper's grey
    # The first of PASCAL VOC's, as its development kit lists them.
    assert voc(6).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128]]
    assert len({tuple(colour) for colour in voc(256).tolist()}) == 256


def test_it_is_loaded_once_and_says_the_same_again(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = transformers.AutoModelForDepthEstimation.from_pretrained

    def counting(path: str, **how: Any) -> Any:
        calls.append(path)
        return real(path, **how)

    monkeypatch.setattr(transformers.AutoModelForDepthEstimation, "from_pretrained", counting)
    from tuner.data.conditions import model

    model._loaded.cache_clear()
    tree = {"path": str(models["depth"]), "task": "depth"}
    torch.manual_seed(5)
    first = made(tree)
    torch.manual_seed(6)
    assert all(np.array_equal(made(tree), first) for _ in range(3))
    assert calls == [str(models["depth"])]
    model._loaded.cache_clear()
    condition = Condition.model_validate({"kind": "model", **tree})
    again = make_condition(condition, picture(), Draw(1, 2, 3), "a.png")
    assert np.array_equal(again, first)  # loaded anew, and for another draw
    assert len(calls) == 2


def test_what_a_processor_would_cut_off_is_kept(models: dict[str, Path], tmp_path: Path) -> None:
    """A processor that crops would move the answer against the pixels."""
    place = tmp_path / "crops"
    place.mkdir()
    for file in models["few"].iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    more = {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}}
    processor(place, image_processor_type="MobileNetV2ImageProcessor", **more)
    tree = {"task": "segmentation", "palette": "voc"}
    assert np.array_equal(made({"path": str(place), **tree}), made({"path": str(models["few"]), **tree}))


def test_what_cannot_be_loaded_is_told(models: dict[str, Path], tmp_path: Path) -> None:
    def told(name: str = "a.png", **tree: Any) -> str:
        with pytest.raises(UserError) as caught:
            made(tree, name)
        return str(caught.value)

    nowhere = str(tmp_path / "nowhere")
    assert told(path=nowhere, task="depth") == (
        f"condition model {nowhere}: no such folder (expected a model's folder, or a Hub id)"
    )
    here = str(models["depth"])
    assert "revision x has no effect: it is here" in told(path=here, task="depth", revision="x")
    assert f"condition model {here}: does not load for segmentation" in told(path=here, task="segmentation")
    few = str(models["few"])
    assert told(path=few, task="segmentation") == (
        "condition model: found a model of 5 classes, palette ade has 150 colours; take palette: voc"
    )
    with pytest.raises(UserError, match="300 classes, palette voc has 256"):
        colours("voc", 300)


def test_a_head_that_is_not_in_the_file_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    """transformers would draw it at random, with a warning."""
    place = tmp_path / "headless"
    place.mkdir()
    for file in models["few"].iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("decode_head.classifier")}
    assert len(kept) == len(tensors) - 2
    save_file(kept, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"2 tensors are missing in its file \(decode_head.classifier.bias"):
        made({"path": str(place), "task": "segmentation", "palette": "voc"})


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_picture_without_an_answer_is_an_error_that_names_it(
    models: dict[str, Path], tmp_path: Path, bad: float
) -> None:
    place = tmp_path / "flat"
    place.mkdir()
    for file in models["depth"].iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / "model.safetensors")
    last = {key: tensor * bad if key.startswith("head") else tensor for key, tensor in tensors.items()}
    assert sum(key.startswith("head") for key in tensors) > 0
    save_file(last, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"folder/b\.png: the condition model cannot be made: .* no depth in it"
    ):
        made({"path": str(place), "task": "depth"}, "folder/b.png")
