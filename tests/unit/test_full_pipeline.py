"""Full training's `diffusers/`: a whole pipeline; what was not trained is as the base's files have it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch

from tuner import single_file, verify
from tuner.export import files
from tuner.objective import Objective
from tuner.verify import VerifyError

CLASSES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd1_inpaint": "StableDiffusionInpaintPipeline",
    "sdxl_inpaint": "StableDiffusionXLInpaintPipeline",
}


def exported(models: ModuleType, base: Path, out: Path, **config: Any) -> Any:
    """A full training's export and what it was made of: family, method, card, written files."""
    family = models.family_of(base, "full")
    method = models.move(models.method_of("full", family, checkpoint_file=False, **config))
    card = models.card_of(torch.float16, method)
    return family, method, card, method.export(family, out, card)


def drawn(pipe: Any) -> Any:
    """What a plain call draws, one step of it."""
    pipe.set_progress_bar_config(disable=True)
    hole = {}
    if "Inpaint" in type(pipe).__name__:
        hole = {"image": torch.zeros(1, 3, 64, 64), "mask_image": torch.ones(1, 1, 64, 64), "strength": 1.0}
    return pipe("a toy", num_inference_steps=2, height=64, width=64, output_type="pt", **hole).images


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_the_folder_is_a_pipeline(
    name: str, text_encoder: bool, folders: dict[str, Path], tmp_path: Path, models: ModuleType
) -> None:
    base, place = folders[name], tmp_path / "diffusers"
    family, method, card, written = exported(models, base, tmp_path, text_encoder=text_encoder)
    lines = verify.check(family, [method], written, card)
    assert len(lines) == len(written) and f"diffusers/ loads whole as {CLASSES[name]}" in lines[0]
    pipe: Any = getattr(diffusers, CLASSES[name]).from_pretrained(place, local_files_only=True)
    trained, seen = method.networks(), 0
    for part in family.modules():
        own = method.state(family, part)
        found = getattr(pipe, part).state_dict()
        assert found.keys() == own.keys() and found.keys()
        for key, tensor in own.items():  # what was trained in the export's type, the rest in the base's
            wanted = tensor.half().float() if part in trained else tensor.float()
            assert torch.equal(found[key], wanted), (part, key)
            seen += 1
        if part not in trained:
            (stored,) = (place / part).glob("*.safetensors")
            assert stored.read_bytes() == (base / part / stored.name).read_bytes()
    assert seen > 300
    tokenizers = [part for part in pipe.components if part.startswith("tokenizer")]
    assert len(tokenizers) == (2 if "sdxl" in name else 1)
    for part, own in zip(tokenizers, family.tokenizers.values(), strict=True):
        text = "a red toy, <strange>"
        assert getattr(pipe, part)(text).input_ids == own(text).input_ids
    whole = {*family.modules(), *tokenizers, "scheduler"}
    assert {p.name for p in place.iterdir() if p.is_dir()} == whole
    assert bool(torch.isfinite(torch.as_tensor(drawn(pipe))).all())


def test_bytes_are_those_of_the_same_training(
    sd1_folder: Path, tmp_path: Path, models: ModuleType, digests: Callable[[Path], dict[str, str]]
) -> None:
    for name in ("a", "b"):
        exported(models, sd1_folder, tmp_path / name)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    family, method, card, _ = exported(models, sd1_folder, tmp_path / "c")
    (tmp_path / "c" / "diffusers" / "vae" / "strange").touch()
    method.export(family, tmp_path / "c", card)  # an older folder is replaced as a whole
    assert digests(tmp_path / "c") == digests(tmp_path / "a")


def test_the_networks_alone(sd1_folder: Path, tmp_path: Path, models: ModuleType) -> None:
    family, method, card, written = exported(models, sd1_folder, tmp_path, pipeline=False, text_encoder=True)
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == [
        "diffusers/text_encoder/config.json",
        "diffusers/text_encoder/model.safetensors",
        "diffusers/unet/config.json",
        "diffusers/unet/diffusion_pytorch_model.safetensors",
    ]
    assert not any("pipeline" in line.lower() for line in verify.check(family, [method], written, card))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("DDIMScheduler", {}, ("DDIMScheduler", "epsilon", None, None)),
        ("PNDMScheduler", {"prediction": "v_prediction"}, ("PNDMScheduler", "v_prediction", None, None)),
        ("PNDMScheduler", {"zero_terminal_snr": True}, ("DDIMScheduler", "v_prediction", True, "trailing")),
        ("EulerDiscreteScheduler", {"zero_terminal_snr": True}, None),
    ],
)
def test_the_scheduler_is_the_one_that_was_trained_for(
    kind: str, options: Any, expected: Any, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    shutil.rmtree(base / "scheduler")
    models.scheduler(kind).save_pretrained(base / "scheduler")
    if options.get("zero_terminal_snr"):
        options = {**options, "prediction": "v_prediction"}
    family = models.family_of(base, "full")
    method = models.method_of("full", family, checkpoint_file=False)
    objective = Objective.from_scheduler_config(family.scheduler_config, **options)
    family.scheduler_config = objective.sampling(family.scheduler_config)
    card = models.card_of(torch.float16, method)
    written = method.export(family, tmp_path, card)
    assert verify.check(family, [method], written, card)
    told = json.loads((tmp_path / "diffusers/scheduler/scheduler_config.json").read_text())
    keys = ("_class_name", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    found = tuple(told.get(key) for key in keys)
    if expected is None:
        expected = (kind, "v_prediction", True, "trailing")
    original = json.loads((base / "scheduler/scheduler_config.json").read_text())
    if expected[0] == kind and expected[2] is None:  # nothing else has changed
        assert told == original | {"prediction_type": expected[1]}
        assert found[:2] == expected[:2]
    else:
        assert found == expected
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "diffusers")
    assert type(pipe.scheduler).__name__ == expected[0]
    assert pipe.scheduler.config.beta_end == 0.012
    if expected[0] == "DDIMScheduler":
        assert pipe.scheduler.config.clip_sample is False


def test_a_checkpoint_in_one_file_as_the_base(
    folders: dict[str, Path], states: Any, tmp_path: Path, models: ModuleType
) -> None:
    path = files.save(tmp_path / "base.safetensors", states["sdxl"], {})
    folder = single_file.as_folder(path, tmp_path / "cache", configs=folders["sdxl"])
    family, method, card, written = exported(models, folder, tmp_path / "out", text_encoder=True)
    assert verify.check(family, [method], written, card)
    place = tmp_path / "out" / "diffusers"
    pipe: Any = diffusers.StableDiffusionXLPipeline.from_pretrained(place, local_files_only=True)
    vae = pipe.vae.state_dict()
    for key, tensor in method.state(family, "vae").items():
        assert torch.equal(vae[key], tensor.float())
    assert len(vae) > 50 and bool(torch.isfinite(torch.as_tensor(drawn(pipe))).all())


def test_a_base_in_half_precision_gives_a_pipeline_of_one_type(
    sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    """transformers would take a file's own type, and the plain call dies on mixed ones."""
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    for part in ("vae", "text_encoder"):
        (path,) = (base / part).glob("*.safetensors")
        tensors, told = files.load(path)
        files.save(path, {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}, told)
    config = json.loads((base / "text_encoder/config.json").read_text())
    private = {"dtype": "float16", "torch_dtype": "float16", "_name_or_path": "/home/someone/base"}
    (base / "text_encoder/config.json").write_text(json.dumps(config | private))
    tokenizer = json.loads((base / "tokenizer/tokenizer_config.json").read_text())
    private = {"name_or_path": "/home/someone/base"}
    (base / "tokenizer/tokenizer_config.json").write_text(json.dumps(tokenizer | private))
    family, method, card, written = exported(models, base, tmp_path)
    assert verify.check(family, [method], written, card)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "diffusers")
    assert {getattr(pipe, name).dtype for name in ("unet", "vae", "text_encoder")} == {torch.float32}
    drawn(pipe)
    texts = [p.read_text() for p in (tmp_path / "diffusers").rglob("*config.json")]
    assert len(texts) == 5 and not any("someone" in text for text in texts)
    stored, _ = files.load(tmp_path / "diffusers/text_encoder/model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}


def test_another_autoencoder_is_the_pipelines(
    folders: dict[str, Path], tmp_path: Path, models: ModuleType
) -> None:
    from tuner import base
    from tuner.data.cache import Hashes
    from tuner.family import Options
    from tuner.methods.full import Config, Full

    other, name = tmp_path / "other", "diffusion_pytorch_model.safetensors"
    shutil.copytree(folders["sd1"] / "vae", other)
    tensors, told = files.load(other / name)
    files.save(other / name, {key: 2 * tensor for key, tensor in tensors.items()}, told)
    family = base.load(str(folders["sd1"]), None, (), Full.NEEDS, 0, Hashes(tmp_path), Options(vae=other))
    method = Full(Config(checkpoint_file=False), family, 0)
    method.export(family, tmp_path, models.card_of(torch.float16, method))
    assert (tmp_path / "diffusers/vae" / name).read_bytes() == (other / name).read_bytes()


def index(place: Path) -> None:
    (place / "model_index.json").unlink()


def vae(place: Path) -> None:
    path = place / "vae" / "diffusion_pytorch_model.safetensors"
    tensors, told = files.load(path)
    files.save(path, tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + 1}, told)


def scheduler(place: Path) -> None:
    path = place / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))


def place_of_this_machine(place: Path) -> None:
    path = place / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name_or_path": "/home/someone/x"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (index, "does not load as a pipeline"),
        (vae, "diffusers/vae: quant_conv.bias is not what the base has"),
        (scheduler, "diffusers/scheduler: prediction_type is not epsilon"),
        (place_of_this_machine, "tokenizer_config.json holds a path of this machine"),
    ],
)
def test_a_damaged_pipeline_is_named(
    damage: Any, message: str, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    family, method, card, written = exported(models, sd1_folder, tmp_path)
    damage(tmp_path / "diffusers")
    with pytest.raises(VerifyError, match=message):
        verify.check(family, [method], written, card)
