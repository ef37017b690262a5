"""How a base is recognised and loaded, what its networks are told, and what holds for full-size ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner import base, build, fits, recipe, single_file
from tuner.data import holes
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.family import Options
from tuner.objective import Objective
from tuner.task import Task

CONFIGS = Path(base.__file__).parent / "configs"
SHIPPED = {
    "sd15": ("sd1", False),
    "sd15-inpainting": ("sd1", True),
    "sd21": ("sd2", False),
    "sd21-base": ("sd2", False),
    "sdxl": ("sdxl", False),
    "sdxl-inpainting": ("sdxl", True),
}
NEEDS = ("unet", "vae", "text_encoder")
T = torch.tensor([501, 101])


@pytest.fixture
def load(folders: dict[str, Path], tmp_path: Path) -> Any:
    """A fresh tiny base by name (or in a folder), with options."""

    def fresh(name: str | Path, needs: tuple[str, ...] = NEEDS, **options: Any) -> Any:
        place = folders[name] if isinstance(name, str) else name
        return base.load(str(place), None, (), needs, 0, Hashes(tmp_path / "hashes"), Options(**options))

    return fresh


def test_every_tiny_base_is_recognised(folders: dict[str, Path], load: Any) -> None:
    facts = {}
    for name, folder in folders.items():
        family = load(name, ("unet",))
        facts[name] = (base.recognise(folder), family.inpainting, family.scheduler_config["prediction_type"])
    assert facts == {
        "sd1": ("sd1", False, "epsilon"),
        "sd2": ("sd2", False, "v_prediction"),
        "sdxl": ("sdxl", False, "epsilon"),
        "sd1_inpaint": ("sd1", True, "epsilon"),
        "sdxl_inpaint": ("sdxl", True, "epsilon"),
    }


def test_the_shipped_configurations_are_recognised() -> None:
    found = {place.name: base.recognise(place) for place in CONFIGS.iterdir() if (place / "unet").is_dir()}
    assert found == {name: family for name, (family, _) in SHIPPED.items()}


def changed(folder: Path, into: Path, **unet: Any) -> Path:
    """A folder with a base's text encoders and another UNet configuration."""
    for name in ("unet", *(place.name for place in folder.glob("text_encoder*"))):
        (into / name).mkdir(parents=True)
    config = json.loads((folder / "unet" / "config.json").read_text()) | unet
    (into / "unet" / "config.json").write_text(json.dumps(config))
    return into


def test_what_no_family_knows_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    assert base.recognise(changed(folders["sdxl"], tmp_path / "same")) == "sdxl"
    refiner = changed(folders["sdxl"], tmp_path / "refiner")
    (refiner / "text_encoder").rmdir()
    with pytest.raises(UserError, match=r"none of the families sd1, sd2, sdxl .* UNet2D.*, text_encoder_2$"):
        base.recognise(refiner)
    other = changed(folders["sd1"], tmp_path / "other", _class_name="UNet3DConditionModel")
    with pytest.raises(UserError, match=r"a UNet3DConditionModel, text_encoder$"):
        base.recognise(other)
    with pytest.raises(UserError, match=r"no unet/config\.json, no text encoder$"):
        base.recognise(tmp_path)


def test_networks_that_do_not_fit_are_an_error(
    folders: dict[str, Path], models: ModuleType, tmp_path: Path, load: Any
) -> None:
    odd = models.tiny_sd1(tmp_path / "odd", in_channels=5)
    with pytest.raises(UserError, match=r"in_channels 5; expected 4, or 9 of an inpainting base"):
        load(odd)
    (tmp_path / "odd" / "unet").rename(tmp_path / "old")
    (tmp_path / "odd" / "unet").symlink_to(folders["sd2"] / "unet")
    (tmp_path / "odd" / "text_encoder_2").symlink_to(folders["sdxl"] / "text_encoder_2")
    (tmp_path / "odd" / "tokenizer_2").symlink_to(folders["sdxl"] / "tokenizer_2")
    unet = models.unet(
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=96,
    )
    (tmp_path / "odd" / "unet").unlink()
    unet.save_pretrained(tmp_path / "odd" / "unet")
    with pytest.raises(UserError, match="cross_attention_dim 32 is not the text encoders' width 96"):
        load(tmp_path / "odd")


def meta_unet(name: str) -> Any:
    """A full-size UNet without memory."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / name / "unet"))


def millions(module: Any) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()) / 1e6)


@pytest.mark.parametrize(
    ("name", "unet", "branch"),
    [("sd15", 859.52, 361.28), ("sd21", 865.91, 364.23), ("sdxl", 2567.46, 1251.01)],
)
def test_full_size_networks_have_the_known_numbers_of_parameters(
    name: str, unet: float, branch: float
) -> None:
    kind = importlib.import_module(f"tuner.families.{SHIPPED[name][0]}").FAMILY
    family = kind({"unet": meta_unet(name)}, {}, {})
    with torch.device("meta"):
        clone = family.control_branch(3)
    assert millions(family.denoiser) == pytest.approx(unet, abs=0.005)
    assert millions(clone) == pytest.approx(branch, abs=0.005)
    assert {p.device.type for p in [*family.denoiser.parameters(), *clone.parameters()]} == {"meta"}


@pytest.mark.parametrize("name", ["sd15-inpainting", "sdxl-inpainting"])
def test_full_size_inpainting_networks_differ_in_their_first_convolution(name: str) -> None:
    kind = importlib.import_module(f"tuner.families.{SHIPPED[name][0]}").FAMILY
    family, plain = (kind({"unet": meta_unet(n)}, {}, {}) for n in (name, name.removesuffix("-inpainting")))
    assert family.inpainting and not plain.inpainting
    assert millions(family.denoiser) - millions(plain.denoiser) == pytest.approx(5 * 320 * 9 / 1e6, abs=1e-9)
    with torch.device("meta"):
        assert millions(family.control_branch(3)) == millions(plain.control_branch(3))


def test_an_inpainting_base_is_shown_what_its_pipeline_shows(load: Any) -> None:
    family = load("sd1_inpaint")
    pipe = family.pipeline()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1
    hole = torch.from_numpy(np.stack([holes.draw((64, 64), 0, 0, at) for at in (1, 2)]))
    assert 0 < float(hole.mean()) < 1
    found = family.inpaint(pixels, hole)
    seen: list[Tensor] = []
    family.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    text = family.encode_prompts(family.tokenize(["a", "b"]))
    with torch.no_grad():
        pipe(
            prompt_embeds=text.hidden,
            image=(pixels + 1) / 2,
            mask_image=hole,
            num_inference_steps=1,
            guidance_scale=1.0,
            output_type="latent",
        )
    assert len(seen) == 1 and seen[0].shape == (2, 9, 8, 8) and found.shape == (2, 5, 8, 8)
    assert torch.equal(seen[0][:, 4:5], found[:, :1])
    torch.testing.assert_close(seen[0][:, 5:], found[:, 1:], rtol=1e-5, atol=1e-6)
    assert set(found[:, 0].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["sdxl", "sd1_inpaint", "sdxl_inpaint"])
def test_what_is_not_told_is_the_whole_picture_all_to_be_drawn(load: Any, name: str) -> None:
    family = load(name)
    text = family.encode_prompts(family.tokenize(["a", "b"]))
    x_t = torch.randn(2, 4, 8, 4, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[64, 32, 0, 0, 64, 32.0]] * 2) if family.told_sizes else None
    concat = None
    if family.inpainting:
        concat = family.inpaint(torch.zeros(2, 3, 64, 32), torch.ones(2, 1, 64, 32))
    branch = family.control_branch(3)
    picture = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.nn.init.normal_(branch.controlnet_cond_embedding.conv_out.weight, std=0.1)
        torch.nn.init.eye_(branch.controlnet_mid_block.weight[:, :, 0, 0])
        short, full = family.condition(text), family.condition(text, sizes, concat)
        torch.testing.assert_close(
            family.predict(family.denoiser, x_t, T, short), family.predict(family.denoiser, x_t, T, full)
        )
        one, other = (family.control(branch, x_t, T, cond, picture) for cond in (short, full))
        assert torch.equal(one.middle, other.middle) and bool(one.middle.any())
        if sizes is not None:
            moved = family.condition(text, sizes + torch.tensor([0, 0, 8, 0, 0, 0]), concat)
            assert not torch.equal(
                family.predict(family.denoiser, x_t, T, moved), family.predict(family.denoiser, x_t, T, full)
            )
        if concat is not None:
            assert branch.config.in_channels == branch.conv_in.in_channels == 4
            moved = family.condition(text, sizes, concat + 0.1)
            assert not torch.equal(
                family.predict(family.denoiser, x_t, T, moved), family.predict(family.denoiser, x_t, T, full)
            )


def test_another_autoencoder_is_used_and_has_its_own_digest(
    load: Any, models: ModuleType, tmp_path: Path
) -> None:
    other = models.tiny_sd1(tmp_path / "other", seed=9) / "vae"
    family, own, theirs = load("sd1", vae=other), load("sd1"), load(tmp_path / "other")
    assert family.digests["vae"] == theirs.digests["vae"] != own.digests["vae"]
    assert {n: d for n, d in family.digests.items() if n != "vae"} == {
        n: d for n, d in own.digests.items() if n != "vae"
    }
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(family.encode_images(pixels).mean, theirs.encode_images(pixels).mean)
    assert not torch.equal(family.encode_images(pixels).mean, own.encode_images(pixels).mean)
    assert family.pipeline().vae is family.networks["vae"]
    with pytest.raises(UserError, match=r"base\.vae: .*nowhere: expected a folder with an autoencoder's"):
        load("sd1", vae=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"base\.vae: has no effect: this run loads text_encoder only"):
        load("sd1", ("text_encoder",), vae=other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_autoencoder_stays_in_float32_where_half_precision_overflows(
    load: Any, dtype: torch.dtype
) -> None:
    family = load("sdxl")
    vae = family.networks["vae"]
    with torch.no_grad():  # as in SDXL's autoencoder, activations within are beyond 65504
        vae.decoder.conv_in.weight *= 1e6
        vae.encoder.conv_in.weight *= 1e6
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    decoded, mean = family.decode_latents(latents), family.encode_images(pixels).mean
    within: list[Tensor] = []
    handles = [
        part.conv_in.register_forward_hook(lambda _, __, output: within.append(output))
        for part in (vae.decoder, vae.encoder)
    ]
    family.cast(dtype, [])
    with torch.autocast("cpu", dtype):
        again = family.decode_latents(latents.to(dtype).float()), family.encode_images(pixels).mean
    for handle in handles:
        handle.remove()
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    assert {p.dtype for p in family.denoiser.parameters()} == {dtype}
    assert [part.dtype for part in within] == [torch.float32] * 2
    assert all(float(part.abs().max()) > 65504 for part in within)
    assert torch.equal(again[1], mean) and again[0].dtype == torch.float32
    torch.testing.assert_close(again[0], decoded, rtol=0.05, atol=0.05)


def test_a_file_goes_to_the_reader_of_single_files(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my.model.safetensors"
    file.write_bytes(b"")
    asked: list[Path] = []

    def as_folder(path: Path, cache: Path, prediction: str | None) -> Path:
        asked.append(path)
        assert cache == tmp_path / "hashes" and prediction is None
        return folders["sd2"]

    told = SimpleNamespace(told=lambda: "a Stable Diffusion")
    monkeypatch.setattr(single_file, "describe", lambda *_: told)
    monkeypatch.setattr(single_file, "as_folder", as_folder)
    monkeypatch.setattr(
        single_file, "autoencoder_folder", lambda path, _, configs: asked.append(path) or folders["sd1"]
    )
    hashes, options = Hashes(tmp_path / "hashes"), Options(vae=file)
    family = base.load(str(file), None, (), ("unet", "vae"), 0, hashes, options)
    assert asked == [file, file] and family.name == "sd2" and family.title == "my.model"
    assert family.digests["vae"] == base.component_digest(folders["sd1"] / "vae", hashes)
    with pytest.raises(UserError, match=r"base\.revision: main has no effect"):
        base.load(str(file), "main", (), ("unet",), 0, Hashes(tmp_path / "hashes"))


RECIPE = """
base: {{path: {base}{more}}}
method: {method}
data: {{source: nowhere, resolution: 32, cache: 'off'}}
train: {{steps: 1, batch_size: 2, learning_rate: 1e-3}}
output: {output}
"""


def written(tmp_path: Path, folder: Path, method: str, more: str) -> recipe.Recipe:
    place = tmp_path / "recipe.yaml"
    place.write_text(RECIPE.format(base=folder, more=more, method=method, output=tmp_path / "out"))
    return recipe.load(place)


def test_quantised_bases_are_refused_where_they_cannot_be(
    folders: dict[str, Path], tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for why in (ModuleNotFoundError("No module named 'bitsandbytes'"), RuntimeError("CUDA Setup failed")):

        def lacking(why: Exception = why) -> None:
            raise why

        monkeypatch.setattr(base.quantised, "library", lacking)
        with pytest.raises(UserError, match=r"base\.quantise: int8 needs bitsandbytes, which cannot be"):
            load("sd1", quantise="int8")
    with pytest.raises(UserError, match=r"base\.quantise: has no effect: this run loads vae only"):
        load("sd1", ("vae",), quantise="nf4")
    about = written(tmp_path, folders["sd1"], "full", ", quantise: nf4")
    with pytest.raises(UserError, match=r"base\.quantise: method full trains the unet itself"):
        build.build(about, SimpleNamespace(num_processes=1, process_index=0))  # type: ignore[arg-type]
    with pytest.raises(recipe.RecipeError, match="found with unet in new, which are not frozen"):
        written(tmp_path, folders["sd1"], "lora", ", quantise: nf4, new: [unet, vae]")
    with pytest.raises(recipe.RecipeError, match="found together with vae in new"):
        written(tmp_path, folders["sd1"], "lora", ", vae: somewhere, new: [vae]")


@pytest.mark.parametrize("key", ["clip_skip", "windows"])
@pytest.mark.parametrize("name", ["autoencoder", "contrastive"])
def test_text_options_have_no_effect_on_methods_that_make_a_base(
    folders: dict[str, Path], tmp_path: Path, models: ModuleType, name: str, key: str
) -> None:
    about = written(tmp_path, folders["sd1"], name, f", {key}: 2")
    method = models.method_of(name, models.family_of(folders["sd1"], name))
    with pytest.raises(UserError, match=rf"base\.{key}: method {name} reads no prompt"):
        fits.check_uses(about, [method])


@pytest.mark.parametrize("name", ["sd2", "sd1_inpaint"])
def test_the_run_tells_what_the_base_is(load: Any, name: str) -> None:
    family = load(name)
    task = Task(family, [], Objective.from_scheduler_config(family.scheduler_config))
    words = build._kind(family, task)
    if name == "sd2":
        assert words == "sd2, v_prediction"
    else:
        assert words.startswith("sd1, epsilon, inpainting: ") and words.endswith("hidden at random")
