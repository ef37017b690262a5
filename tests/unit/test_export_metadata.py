from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.export import files, metadata

LORA = {
    "rank": 4,
    "alpha": 8,
    "resolution": 128,
    "prediction_type": "epsilon",
    "trigger_phrase": "sketch style",
}


def a_recipe(root: Path, output: str) -> dict[str, Any]:
    return {
        "base": {"path": str(root / "models" / "small-sd"), "vae": f"{root}/vae/"},
        "method": {"lora": {"rank": 4, "init": f"{root}/older/x.safetensors"}},
        "data": {
            "source": [{"path": str(root / "pictures" / "sketches")}, "lambdalabs/naruto"],
            "resolution": 128,
            "cache": str(root / "cache"),
        },
        "train": {"steps": 10, "threads": 2, "learning_rate": 1e-4},
        "log": {"folder": str(root / "log")},
        "output": output,
    }


def built(recipe: dict[str, Any], **changes: Any) -> dict[str, str]:
    base, source = recipe["base"]["path"], recipe["data"]["source"][0]["path"]
    return metadata.build(
        "lora",
        **{
            "name": "sketch",
            "recipe_text": metadata.recipe_text(recipe),
            "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
            "base_name": base,
            "base_digest": "b" * 64,
            "data_digests": {source: "d" * 64},
            "extra": LORA,
            **changes,
        },
    )


def test_two_places_and_outputs_give_equal_metadata_without_a_trace_of_either(tmp_path: Path) -> None:
    alice, bob = tmp_path / "home" / "alice", tmp_path / "bob" / "deep"
    first = built(a_recipe(alice, str(alice / "runs" / "one")))
    assert first == built(a_recipe(bob, "runs/two"))
    text = json.dumps(first)
    for trace in ("alice", "bob", str(tmp_path), "home", "runs", "cache", "threads"):
        assert trace not in text, trace
    assert json.loads(first["tuner.base"]) == {"name": "small-sd", "digest": "b" * 64}
    assert json.loads(first["tuner.data"]) == {"sketches": "d" * 64}
    assert json.loads(first["tuner.recipe"]) == {
        "base": {"path": "small-sd", "vae": "vae"},
        "method": {"lora": {"rank": 4, "init": "x.safetensors"}},
        "data": {"source": [{"path": "sketches"}, "lambdalabs/naruto"], "resolution": 128},
        "train": {"steps": 10, "learning_rate": 1e-4},
    }


def test_keys_of_a_lora() -> None:
    found = built(a_recipe(Path("/somewhere"), "out"))
    own = {key: value for key, value in found.items() if not key.startswith("tuner.")}
    assert own == {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "128x128",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "sketch",
        "modelspec.trigger_phrase": "sketch style",
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "8.0",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "ss_output_name": "sketch",
        "ss_v2": "False",
    }
    assert list(found) == sorted(found)
    assert sorted(set(found) - set(own)) == ["tuner.base", "tuner.data", "tuner.recipe", "tuner.versions"]
    assert json.loads(found["tuner.versions"]) == {"torch": "2.13.0", "diffusers": "0.42.1"}


@pytest.mark.parametrize(
    ("kind", "architecture"),
    [
        ("textual_inversion", "stable-diffusion-v1/textual-inversion"),
        ("controlnet", "stable-diffusion-v1/controlnet"),
        ("full", "stable-diffusion-v1"),
    ],
)
def test_other_kinds(kind: metadata.Kind, architecture: str) -> None:
    found = metadata.build(
        kind,
        name="x",
        recipe_text="{}",
        versions={},
        base_name="owner/name",
        base_digest="b",
        data_digests={},
        extra={"resolution": (640, 512), "prediction_type": "v_prediction"},
    )
    assert found["modelspec.architecture"] == architecture
    assert found["modelspec.resolution"] == "640x512" and found["modelspec.prediction_type"] == "v"
    assert json.loads(found["tuner.base"])["name"] == "owner/name"
    assert not any(key.startswith("ss_") for key in found)


@pytest.mark.parametrize(
    ("family", "prediction", "architecture", "version", "v2"),
    [
        ("sd1", "epsilon", "stable-diffusion-v1", "sd_v1", "False"),
        ("sd1", "v_prediction", "stable-diffusion-v1", "sd_v1_v", "False"),
        ("sd2", "epsilon", "stable-diffusion-v2-512", "sd_v2", "True"),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v", "sd_v2_v", "True"),
        ("sdxl", "epsilon", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
        ("sdxl", "v_prediction", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
    ],
)
def test_families(family: str, prediction: str, architecture: str, version: str, v2: str) -> None:
    extra = {**LORA, "family": family, "prediction_type": prediction}
    found = built(a_recipe(Path("/somewhere"), "out"), extra=extra)
    assert found["modelspec.architecture"] == f"{architecture}/lora"
    assert (found["ss_base_model_version"], found["ss_v2"]) == (version, v2)
    assert found["modelspec.prediction_type"] == ("v" if prediction == "v_prediction" else "epsilon")
    # By these Forge and A1111 tell the version: "sdxl_...", else ss_v2, else modelspec's v1.
    assert version.startswith("sdxl_") == (family == "sdxl") and (v2 == "True") == (family == "sd2")


def test_what_is_told_only_if_it_is_known() -> None:
    more = {"licence": "CC0-1.0", "clip_skip": 2, "algorithm": "lokr", "tag_frequency": {"red": 3}}
    found = built(a_recipe(Path("/somewhere"), "out"), extra={**LORA, **more})
    own = {key: found[key] for key in found.keys() - built(a_recipe(Path("/somewhere"), "out")).keys()}
    assert own == {
        "modelspec.license": "CC0-1.0",
        "modelspec.encoder_layer": "2",
        "ss_clip_skip": "2",
        "ss_network_args": '{"algo": "lokr"}',
        "ss_tag_frequency": '{"sketch": {"red": 3}}',
    }
    assert found["ss_network_module"] == "lycoris.kohya"
    assert (
        built(a_recipe(Path("/s"), "o"), extra={**LORA, "algorithm": "dora"})["ss_network_module"]
        == "networks.lora"
    )


def test_metadata_of_a_file_made_of_another() -> None:
    tensors = {"a": torch.ones(2)}
    old = metadata.with_hash({"x": "1", "y": "2", "format": "pt"}, {"a": torch.zeros(2)})
    new = metadata.derived(old, tensors, {"y": None, "z": "3"})
    assert new == {
        "format": "pt",
        "modelspec.hash_sha256": "0x" + files.data_digest(tensors),
        "x": "1",
        "z": "3",
    }


def test_faults_are_named() -> None:
    recipe = a_recipe(Path("/somewhere"), "out")
    with pytest.raises(metadata.MetadataError, match="unknown metadata autor"):
        built(recipe, extra={**LORA, "autor": "x"})
    with pytest.raises(metadata.MetadataError, match="unknown family 'sd9'"):
        built(recipe, extra={**LORA, "family": "sd9"})
    with pytest.raises(metadata.MetadataError, match="rank and alpha"):
        built(recipe, extra={"rank": 4})
    with pytest.raises(metadata.MetadataError, match="unknown algorithm 'lohr'; known are lora, dora"):
        built(recipe, extra={**LORA, "algorithm": "lohr"})
    with pytest.raises(metadata.MetadataError, match="algorithm, alpha: the metadata of a full has no place"):
        metadata.build(
            "full",
            name="x",
            recipe_text="{}",
            versions={},
            base_name="x",
            base_digest="b",
            data_digests={},
            extra={"alpha": 1.0, "algorithm": "lora"},
        )


def test_relative_paths_that_exist_are_shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alice" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = {"base": "alice/pictures", "data": {"source": "alice/pictures/"}, "train": {"steps": 1}}
    assert metadata.scrub(recipe) == {
        "base": "pictures",
        "data": {"source": "pictures"},
        "train": {"steps": 1},
    }
    monkeypatch.chdir(tmp_path / "alice")
    assert metadata.scrub({"base": "alice/pictures"}) == {"base": "alice/pictures"}  # a name on the Hub here


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/home/alice/set", "set"),
        ("../alice/set/", "set"),
        ("./set", "set"),
        ("~/set", "set"),
        ("~alice", "local"),
        ("~", "local"),
        ("..", "local"),
        ("/", "local"),
        ("C:\\Users\\alice\\set", "set"),
        ("C:\\", "local"),
        ("file:///home/alice/set", "set"),
        ("owner/name", "owner/name"),
        ("embedded", "embedded"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("...and so on", "...and so on"),
        ("a caption, " * 2000 + "red/blue", "a caption, " * 2000 + "red/blue"),
    ],
)
def test_local_name(text: str, name: str) -> None:
    assert metadata.local_name(text) == name


def test_scrub_leaves_the_recipe_as_it_was() -> None:
    recipe = a_recipe(Path("/home/alice"), "out")
    before = json.dumps(recipe)
    metadata.scrub(recipe)
    assert json.dumps(recipe) == before


def test_no_environment_goes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = a_recipe(Path("/somewhere"), "out")
    first = built(recipe)
    for name in ("USER", "LOGNAME", "HOSTNAME", "HOME", "TZ"):
        monkeypatch.setenv(name, "planted")
    assert os.environ["USER"] == "planted"
    assert built(recipe) == first


def test_the_hash_is_that_of_the_files_data(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3), "a": torch.randn(2, 2).half()}
    signed = metadata.with_hash({"z": "1"}, tensors)
    assert list(signed) == ["modelspec.hash_sha256", "z"]
    assert signed["modelspec.hash_sha256"] == "0x" + files.data_digest(tensors)
    path = files.save(tmp_path / "x", tensors, signed)
    assert files.load(path)[1] == signed


def test_what_it_began_from_and_what_the_base_is() -> None:
    """Only where they apply: the files that training began from, a base that fills holes, zero SNR."""
    recipe = a_recipe(Path("/somewhere"), "out")
    plain = built(recipe)
    for nothing in ({"start": {}}, {"inpainting": False}, {"zero_terminal_snr": False}):
        assert built(recipe, extra={**LORA, **nothing}) == plain
    began = built(recipe, extra={**LORA, "start": {"method.lora.start": "e" * 64}})
    assert json.loads(began.pop("tuner.start")) == {"method.lora.start": "e" * 64} and began == plain
    holes = built(recipe, extra={**LORA, "inpainting": True})
    assert json.loads(holes["tuner.base"]) == {"name": "small-sd", "digest": "b" * 64, "inpainting": True}
    assert {key for key in holes if holes[key] != plain[key]} == {"tuner.base"}
    zero = built(recipe, extra={**LORA, "zero_terminal_snr": True})
    assert zero.pop("ss_zero_terminal_snr") == "True" and zero == plain


@pytest.mark.parametrize(
    ("kind", "family", "architecture"),
    [
        ("full", "sd1", "stable-diffusion-v1-inpainting"),
        ("full", "sdxl", "stable-diffusion-xl-v1-base"),
        ("controlnet", "sd1", "stable-diffusion-v1/controlnet"),
        ("textual_inversion", "sd1", "stable-diffusion-v1/textual-inversion"),
    ],
)
def test_the_architecture_of_an_inpainting_base(kind: metadata.Kind, family: str, architecture: str) -> None:
    found = metadata.build(
        kind,
        name="x",
        recipe_text="{}",
        versions={},
        base_name="owner/name",
        base_digest="b",
        data_digests={},
        extra={"family": family, "inpainting": True, "zero_terminal_snr": True},
    )
    assert found["modelspec.architecture"] == architecture
    assert json.loads(found["tuner.base"])["inpainting"] is True
    assert not any("snr" in key for key in found)  # neither modelspec nor kohya has a key for it there
