"""`tuner inspect | verify | convert | merge | resize | extract` on files, as a user calls them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from tuner import cli
from tuner.errors import UserError
from tuner.export import (
    adapter,
    cldm,
    contents,
    embedding,
    files,
    identify,
    kohya,
    lycoris,
    metadata,
    original,
    peft_format,
    rules_checkpoint,
)
from tuner.export.places import Base
from tuner.files import account, bases, lowrank, merge

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls the command line; gives the exit code and what it printed."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    return call


def inner(path: str) -> bool:
    """Layers that every tool adapts."""
    return "projection" not in path and (not path.startswith("unet.") or "_block" in path)


def write_lora(path: Path, base: Base, adapters: ModuleType, **options: Any) -> dict[str, kohya.LoraModule]:
    modules: dict[str, kohya.LoraModule] = adapters.loras(
        base, only=inner, **{"rank": 4, "scale": 2.0, **options}
    )
    tensors = kohya.to_kohya(modules, kohya.naming(base.family, base.unet))
    labels = metadata.labels_of(base.family, None)
    told = {"ss_base_model_version": labels.base_version, "ss_network_dim": "4", "modelspec.title": "mine"}
    files.save(path, tensors, metadata.derived(told, tensors, {}))
    return modules


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def lora(folder: Path, tmp_path: Path, adapters: ModuleType) -> Path:
    write_lora(tmp_path / "x.safetensors", bases.named(str(folder)), adapters)
    return tmp_path / "x.safetensors"


def equal(one: Path, other: Path) -> bool:
    (a, _), (b, _) = files.load(one), files.load(other)
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def changes(path: Path, base: Base) -> dict[str, Tensor]:
    layers = base.layers()
    found = adapter.read(*files.load(path), base).modules
    return {place: lycoris.change(module, layers[place]) for place, module in found.items()}


# --- inspect and verify


def test_inspect(run: Run, lora: Path, folder: Path) -> None:
    code, out, err = run("inspect", lora, "--base", folder)
    assert code == 0 and err == ""
    family = bases.named(str(folder)).family
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in out.splitlines()}
    assert lines["family"] == family and lines["is"].startswith("LoRA (kohya")
    assert lines["ranks"].startswith("4 (") and lines["alphas"].startswith("8.0 (")
    assert [lines[t] for t in ("diffusers", "ComfyUI", "A1111", "Forge", "kohya")] == [
        f"loads all on {folder.name}"
    ] * 5
    code, out, _ = run("inspect", lora, "--base", folder, "--json")
    told = json.loads(out)
    assert code == 0 and told["ranks"].keys() == {"4"} and told["metadata"]["modelspec.title"] == "mine"
    assert {found["loads"] for found in told["tools"].values()} == {"all"} and len(told["tools"]) == 5


def test_verify(run: Run, lora: Path, folder: Path) -> None:
    code, out, err = run("verify", lora, "--base", folder)
    keys = len(files.load(lora)[0])
    assert code == 0 and err == "" and len(out.splitlines()) == 5
    assert all(f" loads all {keys} keys on {folder.name}" in line for line in out.splitlines())
    tensors, told = files.load(lora)
    key = next(key for key in tensors if key.endswith("to_q.lora_up.weight"))
    tensors[key.replace("to_q", "to_qq")] = tensors.pop(key)
    safetensors.torch.save_file(tensors, lora, metadata=told)
    code, out, err = run("verify", lora, "--base", folder)
    assert code == 2 and out == ""
    assert key.replace("to_q", "to_qq") in err and "ComfyUI would load part of it" in err
    assert "Traceback" not in err


def test_verify_by_one_tool(run: Run, lora: Path, folder: Path, tmp_path: Path) -> None:
    assert (
        run("convert", lora, "--to", "peft", "--out", tmp_path / "peft.safetensors", "--base", folder)[0] == 0
    )
    code, _, err = run("verify", tmp_path / "peft.safetensors", "--base", folder)
    assert code == 2 and "ComfyUI would load part" in err
    code, out, _ = run("verify", tmp_path / "peft.safetensors", "--base", folder, "--tool", "Diffusers")
    assert code == 0 and len(out.splitlines()) == 1
    code, _, err = run("verify", tmp_path / "peft.safetensors", "--base", folder, "--tool", "kohya")
    assert code == 2 and "kohya would load nothing" in err
    code, _, err = run("verify", lora, "--base", folder, "--tool", "comfy")
    assert code == 2 and "expected one of diffusers, ComfyUI, A1111, Forge, kohya" in err


def test_the_base_is_found_by_names_and_sizes(run: Run, tmp_path: Path, adapters: ModuleType) -> None:
    for name, family in (("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl"), ("embedded", "sd1")):
        base = bases.named(name)
        some = [p for p in base.adaptable() if p.endswith(("attn2.to_k", "layers.0.mlp.fc1"))]
        modules = adapters.loras(base, only=some.__contains__)
        tensors = kohya.to_kohya(modules, kohya.naming(base.family, base.unet))
        path = files.save(tmp_path / f"{name}.safetensors", tensors, {})
        code, out, err = run("verify", path)
        assert (code, err) == (0, "") and out.count(f"keys on {name}") == 5 and base.family == family


def test_a_base_of_another_size_is_told(run: Run, lora: Path, folder: Path) -> None:
    code, out, _ = run("inspect", lora)
    assert code == 0 and "it fits none of sd15, sd21, sdxl, embedded; say what it was made for" in out
    code, _, err = run("verify", lora)
    assert code == 2 and "--base FOLDER" in err
    code, _, err = run("verify", lora, "--base", "sd9")
    assert code == 2 and err.startswith(
        "base sd9: expected sd15, sd21, sdxl, embedded, or a diffusers folder"
    )


def test_verify_reads_the_hash_of_our_own_files(
    run: Run, tmp_path: Path, sd1_folder: Path, adapters: ModuleType
) -> None:
    base, path = bases.named(str(sd1_folder)), tmp_path / "x.safetensors"
    tensors = kohya.to_kohya(adapters.loras(base, only=lambda place: place.endswith("to_q")))
    files.save(path, tensors, metadata.with_hash({"tuner.versions": "{}"}, tensors))
    assert run("verify", path, "--base", sd1_folder)[0] == 0
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, err = run("verify", path, "--base", sd1_folder)
    assert code == 2 and "modelspec.hash_sha256" in err


def test_unknown_files_are_told(run: Run, tmp_path: Path) -> None:
    path = files.save(tmp_path / "x.safetensors", {"x": torch.ones(2, 2, 2)}, {})
    code, out, _ = run("inspect", path)
    assert code == 0 and "unknown" in out
    code, _, err = run("verify", path)
    assert code == 2 and "no rules for this kind of file (unknown)" in err
    for command in ("inspect", "verify"):
        code, _, err = run(command, tmp_path / "y.safetensors")
        assert code == 2 and err.endswith("there is no such file\n")


# --- vectors of words


@pytest.mark.parametrize(
    ("tensors", "bad"),
    [
        ({"<toy>": (3, 32)}, {}),
        (
            {"<toy>": (1, 32), "<toy>_1": (1, 32)},
            {
                "ComfyUI": "part",
                "diffusers": "nothing",
                "A1111": "nothing",
                "Forge": "nothing",
                "kohya": "part",
            },
        ),
        ({"<toy>": (3, 31)}, dict.fromkeys(("ComfyUI", "diffusers", "A1111", "Forge", "kohya"), "nothing")),
        ({"<toy>": (32,)}, {"kohya": "part"}),
    ],
)
def test_verify_of_vectors(
    run: Run, tmp_path: Path, sd1_folder: Path, tensors: dict[str, tuple[int, ...]], bad: dict[str, str]
) -> None:
    path = files.save(tmp_path / "toy.safetensors", {k: torch.ones(s) for k, s in tensors.items()}, {})
    told = json.loads(run("inspect", path, "--base", sd1_folder, "--json")[1])["tools"]
    expected = dict.fromkeys(("diffusers", "ComfyUI", "A1111", "Forge", "kohya"), "all") | bad
    assert {tool: found["loads"] for tool, found in told.items()} == expected
    assert run("verify", path, "--base", sd1_folder)[0] == (2 if bad else 0)


def test_vectors_of_two_text_encoders(run: Run, tmp_path: Path, sdxl_folder: Path) -> None:
    pair = {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 64)}
    path = files.save(tmp_path / "toy.safetensors", pair, {})
    assert run("verify", path, "--base", sdxl_folder)[0] == 0
    for fault in (
        {"clip_l": pair["clip_l"]},
        {"toy": torch.ones(2, 32)},
        pair | {"clip_g": torch.ones(2, 63)},
        pair | {"x": torch.ones(1, 32)},
    ):
        path = files.save(tmp_path / "toy.safetensors", fault, {})
        assert run("verify", path, "--base", sdxl_folder)[0] == 2, sorted(fault)


def test_the_word_is_the_files_name(run: Run, tmp_path: Path, sd1_folder: Path) -> None:
    path = files.save(tmp_path / "other.safetensors", embedding.to_file("<toy>", torch.ones(1, 32)), {})
    code, out, _ = run("verify", path, "--base", sd1_folder)
    assert code == 0 and "prompts call it other, after the file; diffusers calls it <toy>" in out
    path = path.rename(tmp_path / "toy.safetensors")
    assert "prompts call it" not in run("verify", path, "--base", sd1_folder)[1]


def test_several_keys_become_one(run: Run, tmp_path: Path, sd1_folder: Path) -> None:
    rows = torch.randn(12, 32)
    keys = ["<toy>", *(f"<toy>_{index}" for index in range(1, 12))]
    path = files.save(tmp_path / "rows.safetensors", dict(zip(keys, rows, strict=True)), {"a": "b"})
    out = tmp_path / "toy.safetensors"
    assert run("convert", path, "--to", "comfy", "--out", out)[0] == 0
    tensors, told = files.load(out)
    assert list(tensors) == ["<toy>"] and torch.equal(tensors["<toy>"], rows) and told["a"] == "b"
    assert run("verify", out, "--base", sd1_folder)[0] == 0
    files.save(path, {"emb_params": rows}, {})
    assert run("convert", path, "--to", "diffusers", "--out", out)[0] == 0
    assert torch.equal(files.load(out)[0]["<toy>"], rows)
    for fault in ({"a": rows[:1], "b": rows[:1]}, {"a": rows[:1], "a_2": rows[:1]}):
        files.save(path, fault, {})
        code, _, err = run("convert", path, "--to", "comfy", "--out", out)
        assert code == 2 and ("several words" in err or "expected the keys a, a_1" in err)


# --- ControlNet


def control(path: Path, sd1_folder: Path, form: str) -> ControlNetModel:
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(sd1_folder / "unet"))
    state = net.state_dict()
    files.save(path, state if form == "diffusers" else cldm.to_cldm(state, net.config), {"a": "b"})
    return net


def test_controlnet_there_and_back(run: Run, tmp_path: Path, folders: dict[str, Path]) -> None:
    for family in ("sd1", "sd2", "sdxl"):
        folder, source = folders[family], tmp_path / f"{family}.safetensors"
        net = control(source, folder, "diffusers")
        middle, last = tmp_path / f"control_{family}.safetensors", tmp_path / f"net_{family}"
        assert run("convert", source, "--to", "cldm", "--out", middle, "--base", folder)[0] == 0
        assert files.load(middle)[1]["a"] == "b"
        assert {key.partition(".")[0] for key in files.load(middle)[0]} == {"control_model"}
        assert run("convert", middle, "--to", "diffusers", "--out", last, "--base", folder)[0] == 0
        assert equal(last / "diffusion_pytorch_model.safetensors", source)
        again = ControlNetModel.from_pretrained(last)
        ignored = {"sample_size", "_name_or_path", "_use_default_values", "global_pool_conditions"}
        for key, value in net.config.items():
            assert key in ignored or again.config[key] == value or list(again.config[key]) == list(value), key


def test_verify_of_a_controlnet(run: Run, tmp_path: Path, folders: dict[str, Path]) -> None:
    path = tmp_path / "control_sd15_x.safetensors"

    def loads(folder: Path, name: str = path.name) -> dict[str, str]:
        path.rename(tmp_path / name)
        told = json.loads(run("inspect", tmp_path / name, "--base", folder, "--json")[1])["tools"]
        (tmp_path / name).rename(path)
        return {tool: found["loads"] for tool, found in told.items()}

    control(path, folders["sd1"], "cldm")
    # Tiny: only ComfyUI and Forge build any size, with heads 64 wide where the tiny base's are 32.
    assert loads(folders["sd1"]) == {
        "diffusers": "all",
        "ComfyUI": "part",
        "Forge": "part",
        "sd-webui-controlnet": "nothing",
    }
    control(path, folders["sd2"], "cldm")
    right = {"diffusers": "all", "ComfyUI": "all", "Forge": "all", "sd-webui-controlnet": "nothing"}
    assert loads(folders["sd2"]) == right
    assert loads(folders["sd2"], "x_shuffle.safetensors")["ComfyUI"] == "part"
    control(path, folders["sd2"], "diffusers")
    assert loads(folders["sd2"]) == dict.fromkeys(right, "nothing") | {"diffusers": "all"}
    control(path, folders["sdxl"], "cldm")
    assert loads(folders["sdxl"]) == right | {"diffusers": "nothing"}
    tensors, _ = files.load(path)
    key = next(key for key in tensors if "zero_convs.1" in key)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != key}, path)
    code, _, err = run("verify", path, "--base", folders["sdxl"])
    assert code == 2 and f"missing: {key}" in err
    assert loads(folders["sdxl"])["ComfyUI"] == "part"
    safetensors.torch.save_file(tensors | {"control_model.x": torch.ones(1)}, path)
    assert "control_model.x" in run("verify", path, "--base", folders["sdxl"])[2]


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_published_sizes_load_everywhere(name: str, tmp_path: Path) -> None:
    from tuner.export import rules_controlnet
    from tuner.export.places import controlnet_tensors

    base = bases.named(name)
    shapes = controlnet_tensors(base.unet)
    for form in ("diffusers", "cldm"):
        if form == "cldm":
            with torch.device("meta"):
                state = {key: torch.empty(shape) for key, shape in shapes.items()}
            hint = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
            named = cldm.to_cldm(state, {**base.unet, **hint})
        else:
            named = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        what = contents.of(named, {}, f"control_{name}_x.safetensors")
        found = {t: rules_controlnet.judge(t, what, base).loads for t in rules_controlnet.CONTROLNETS}
        told = {"diffusers": "nothing"} if (name, form) == ("sdxl", "cldm") else {}
        assert found == dict.fromkeys(found, "all") | told and len(found) == 4
        cautions = rules_controlnet.judge("sd-webui-controlnet", what, base).cautions
        assert len(cautions) == {"sd15": 0, "sd21": 1, "sdxl": 0}[name]


# --- convert, merge, resize, extract


def test_convert_there_and_back_is_exact(run: Run, lora: Path, folder: Path, tmp_path: Path) -> None:
    middle, last = tmp_path / "peft.safetensors", tmp_path / "back.safetensors"
    for to in ("peft", "diffusers"):
        code, out, err = run("convert", lora, "--to", to, "--out", middle, "--base", folder)
        assert (code, err) == (0, "") and "modules in peft's names" in out
        assert peft_format.METADATA in files.load(middle)[1]
        for back in ("kohya", "comfy", "a1111"):
            assert run("convert", middle, "--to", back, "--out", last, "--base", folder)[0] == 0
            assert equal(last, lora)
    told = files.load(last)[1]
    assert (
        peft_format.METADATA not in told
        and told["ss_network_dim"] == "4"
        and told["ss_network_alpha"] == "8.0"
    )
    assert told["modelspec.title"] == "mine" and told["ss_output_name"] == "back"
    assert told["modelspec.hash_sha256"] == "0x" + files.data_digest(files.load(last)[0])


def test_convert_dora_needs_the_bases_weights(
    run: Run, tmp_path: Path, sd1_folder: Path, adapters: ModuleType
) -> None:
    base, path = bases.named(str(sd1_folder)), tmp_path / "dora.safetensors"
    modules = adapters.loras(base, only=lambda place: place.endswith("to_q"))
    tensors, told = peft_format.to_peft(modules, {p: torch.rand(m.up.shape[0]) for p, m in modules.items()})
    files.save(path, tensors, told)
    out = tmp_path / "baked.safetensors"
    code, _, err = run("convert", path, "--to", "kohya", "--out", out)
    assert code == 2 and ("--base FOLDER" in err)
    code, line, _ = run("convert", path, "--to", "kohya", "--out", out, "--base", sd1_folder)
    assert code == 0 and "whole differences" in line
    weights = bases.weights(sd1_folder / "unet")
    for place, found in adapter.read(*files.load(out), base).modules.items():
        own = weights[f"{place.removeprefix('unet.')}.weight"]
        expected = lycoris.from_dora(own, modules[place], tensors[f"{place}.lora_magnitude_vector"])
        assert isinstance(found, lycoris.Difference) and torch.equal(found.weight, expected.weight)


def test_convert_mistakes(run: Run, lora: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "y.safetensors"
    for arguments, message in (
        (("--to", "khoya", "--out", out), "--to khoya: expected one of kohya, peft"),
        (("--to", "cldm", "--out", out), "is an adapter; expected one of"),
        (("--to", "kohya", "--out", tmp_path / "y"), "expected a name that ends in .safetensors"),
    ):
        code, _, err = run("convert", lora, *arguments, "--base", folder)
        assert code == 2 and message in err and not out.exists()


def test_merge_of_loras_is_exact(run: Run, folder: Path, tmp_path: Path, adapters: ModuleType) -> None:
    base = bases.named(str(folder))
    for name, rank, scale, seed in (("a", 4, 2.0, 1), ("b", 2, 0.5, 2)):
        write_lora(tmp_path / f"{name}.safetensors", base, adapters, rank=rank, scale=scale, seed=seed)
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "sum"))
    code, line, err = run("merge", "--lora", a, "--lora", f"{b}:-0.5", "--out", out, "--base", folder)
    assert (code, err) == (0, "") and line.strip().endswith("modules of rank 6")
    first, second, found = (changes(path, base) for path in (a, b, out))
    assert found.keys() == first.keys() and len(found) > 40
    for place, change in found.items():  # scales are powers of two: nothing is rounded
        torch.testing.assert_close(change, first[place] - 0.5 * second[place], rtol=0, atol=1e-12)
    told = files.load(out)[1]
    assert told["modelspec.merged_from"] == "a, b" and told["ss_network_dim"] == "6"
    assert run("verify", out, "--base", folder)[0] == 0
    code, _, err = run("merge", "--lora", a, "--out", out, "--base", folder)
    assert code == 2 and "at least two --lora" in err


def test_merge_into_a_base_is_what_diffusers_fuses(
    run: Run, lora: Path, folder: Path, tmp_path: Path, adapters: ModuleType
) -> None:
    out = tmp_path / "merged"
    assert run("merge", "--lora", f"{lora}:0.5", "--into", folder, "--out", out)[0] == 0
    pipe = adapters.pipeline(folder)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name, adapter_name="x")
    pipe.set_adapters(["x"], [0.5])
    expected = adapters.differences(pipe, adapters.pipeline(folder))
    merged, bare = adapters.networks(adapters.pipeline(out)), adapters.networks(adapters.pipeline(folder))
    seen = 0
    for name, network in merged.items():
        old = bare[name].state_dict()
        for key, tensor in network.state_dict().items():
            place = f"{name}.{key.removesuffix('.weight')}"
            change = expected.get(place, torch.zeros((), dtype=torch.float64))
            torch.testing.assert_close(
                tensor.double() - old[key].double(), change.expand_as(tensor), rtol=1e-4, atol=1e-4
            )
            seen += place in expected
    assert seen == len(expected) > 40
    assert (out / "scheduler" / "scheduler_config.json").is_file() and (out / "vae").is_dir()
    code, _, err = run("merge", "--lora", lora, "--into", folder, "--out", out)
    assert code == 2 and "is there already" in err
    code, _, err = run("merge", "--lora", lora, "--into", folder / "unet", "--out", tmp_path / "u")
    assert code == 2 and "give the whole base" in err and not (tmp_path / "u").exists()


def test_merge_into_one_component_and_back_out(
    run: Run, tmp_path: Path, folder: Path, adapters: ModuleType
) -> None:
    base = bases.named(str(folder))
    modules = adapters.loras(base, 3, 0.25, only=lambda p: p.startswith("unet.") and inner(p))
    tensors = kohya.to_kohya(modules, kohya.naming(base.family, base.unet))
    path = files.save(tmp_path / "x.safetensors", tensors, {})
    out, back = tmp_path / "unet", tmp_path / "back.safetensors"
    assert run("merge", "--lora", path, "--into", folder / "unet", "--out", out)[0] == 0
    UNet2DConditionModel.from_pretrained(out)
    code, lines, err = run("extract", folder / "unet", out, "--rank", 3, "--out", back)
    assert (code, err) == (0, "") and "100.00% of the energy kept" in lines
    found, expected = changes(back, base), changes(path, base)
    assert found.keys() == expected.keys() and len(found) > 40
    for place, change in expected.items():
        torch.testing.assert_close(found[place], change, rtol=1e-3, atol=1e-5)
    assert run("verify", back, "--base", folder)[0] == 0
    assert equal_folder(folder / "unet", out, tmp_path / "x.json")
    code, _, err = run("extract", folder / "unet", folder / "unet", "--rank", 3, "--out", back)
    assert code == 2 and "no linear layer or convolution differs" in err


def equal_folder(one: Path, other: Path, _: Path) -> bool:
    names = [sorted(path.name for path in place.iterdir()) for place in (one, other)]
    return names[0] == names[1] and (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def test_extract_of_a_whole_base_names_what_a_lora_cannot_hold(
    run: Run, tmp_path: Path, sdxl_folder: Path, adapters: ModuleType
) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "x.safetensors"
    shutil.copytree(sdxl_folder, tuned)
    torch.manual_seed(5)
    moved = {
        "unet": ["conv_in.bias", "mid_block.resnets.0.conv1.weight"],
        "text_encoder_2": ["text_model.encoder.layers.0.mlp.fc1.weight"],
    }
    for component, names in moved.items():
        (path,) = bases.weights_files(tuned / component)
        tensors, told = files.load(path)
        for name in names:
            tensors[name] = tensors[name] + torch.randn_like(tensors[name])
        files.save(path, tensors, told)
    code, lines, err = run("extract", sdxl_folder, tuned, "--energy", "0.9", "--out", out)
    assert (
        (code, err) == (0, "")
        and "1 changed tensors are not in the LoRA" in lines
        and "unet.conv_in.bias" in lines
    )
    found = changes(out, bases.named(str(sdxl_folder)))
    assert sorted(found) == [
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "unet.mid_block.resnets.0.conv1",
    ]
    for component, names in moved.items():
        for name in names:
            place = f"{component}.{name.removesuffix('.weight')}"
            if place in found:
                whole = (
                    bases.weights(tuned / component)[name].double()
                    - bases.weights(sdxl_folder / component)[name].double()
                )
                lost = ((whole - found[place]) ** 2).sum() / (whole**2).sum()
                assert 0.05 < lost < 0.1, lost


def test_resize(run: Run, lora: Path, folder: Path, tmp_path: Path) -> None:
    base, out = bases.named(str(folder)), tmp_path / "small.safetensors"
    code, lines, err = run("resize", lora, "--rank", 2, "--out", out, "--base", folder)
    assert (code, err) == (0, "") and "rank 2: " in lines and "of the energy kept" in lines
    told = files.load(out)[1]
    assert told["ss_network_dim"] == "2" and told["ss_network_alpha"] == "2.0"
    small, whole = changes(out, base), changes(lora, base)
    assert small.keys() == whole.keys() and len(small) > 40
    for place, change in whole.items():  # as near as any matrix of rank 2 can be
        values = torch.linalg.svdvals(change.flatten(1))
        error = (change - small[place]).norm()
        torch.testing.assert_close(error, (values[2:] ** 2).sum().sqrt(), rtol=1e-3, atol=1e-4)
    assert run("resize", lora, "--rank", 4, "--out", out, "--base", folder)[0] == 0
    for place, change in changes(out, base).items():
        torch.testing.assert_close(change, whole[place], rtol=1e-4, atol=1e-4)
    assert run("resize", lora, "--energy", "0.6", "--out", out, "--base", folder)[0] == 0
    for place, change in changes(out, base).items():
        share = 1 - ((whole[place] - change) ** 2).sum() / (whole[place] ** 2).sum()
        assert 0.6 - 1e-6 <= share < 1
    assert run("verify", out, "--base", folder)[0] == 0
    for arguments, message in (
        ((), "either --rank or --energy"),
        (("--rank", 2, "--energy", 0.5), "either --rank or --energy"),
        (("--rank", 0), "expected at least 1"),
        (("--energy", 1.5), "expected a share"),
    ):
        code, _, err = run("resize", lora, *arguments, "--out", out, "--base", folder)
        assert code == 2 and message in err


def test_resize_makes_a_lora_of_other_kinds(run: Run, tmp_path: Path, sd1_folder: Path) -> None:
    base, torch_seed = bases.named(str(sd1_folder)), torch.manual_seed(7)
    assert torch_seed is not None
    place = "unet.mid_block.resnets.0.conv1"
    out_, in_, *kernel = base.layers()[place]
    loha = lycoris.LohaModule(
        *(torch.randn(s) for s in ((out_, 2), (2, in_ * 9), (out_, 2), (2, in_ * 9))), 0.5
    )
    path, out = tmp_path / "loha.safetensors", tmp_path / "lora.safetensors"
    files.save(path, lycoris.to_lycoris({place: loha}), {"ss_network_args": '{"algo": "loha"}'})
    code, lines, err = run("resize", path, "--rank", 4, "--out", out, "--base", sd1_folder)
    assert (
        (code, err) == (0, "") and "100.00%" in lines and kernel == [3, 3]
    )  # a product of ranks 2 has rank 4
    torch.testing.assert_close(changes(out, base)[place], changes(path, base)[place], rtol=1e-4, atol=1e-3)
    told = files.load(out)[1]
    assert told["ss_network_module"] == "networks.lora" and "ss_network_args" not in told
    assert (
        run(
            "merge", "--lora", path, "--lora", path, "--out", tmp_path / "s.safetensors", "--base", sd1_folder
        )[0]
        == 2
    )


def test_singular_values() -> None:
    torch.manual_seed(0)
    lora = kohya.LoraModule(torch.randn(6, 20, 3, 3), torch.randn(30, 6, 1, 1), 0.3)
    whole = lycoris.change(lora, (30, 20, 3, 3))
    for cut in (lowrank.Cut(rank=2), lowrank.Cut(energy=0.8)):
        one, other = lowrank.shrink(lora, cut), lowrank.nearest(whole, cut, torch.float64)
        assert one.energy == pytest.approx(other.energy) and one.size == pytest.approx(other.size)
        assert one.module.down.shape == other.module.down.shape
        ours, theirs = (lycoris.change(kept.module, (30, 20, 3, 3)) for kept in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        share = 1 - ((whole - theirs) ** 2).sum() / (whole**2).sum()
        assert share.item() == pytest.approx(other.energy)
    values = torch.tensor([2.0, 1.0, 1.0])
    assert [lowrank.Cut(energy=e).of(values) for e in (0.5, 4 / 6, 0.7, 5 / 6, 0.9, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    nothing = lowrank.nearest(torch.zeros(4, 4), lowrank.Cut(rank=2), torch.float32)
    assert nothing.energy == 1.0 and not nothing.module.up.any()


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("b:-2", "b", -2.0),
        ("C:\\a", "C:\\a", 1.0),
    ],
)
def test_weights_of_files(text: str, path: str, weight: float) -> None:
    assert merge.parse(text) == merge.Part(Path(path), weight)


def test_a_weight_that_is_none() -> None:
    with pytest.raises(UserError, match="'half' is no number"):
        merge.parse("a:half")


def test_older_names_of_text_encoders_stay(
    run: Run, tmp_path: Path, sd1_folder: Path, adapters: ModuleType
) -> None:
    """A base saved before transformers 5.6 has `text_model.` in its text encoder's keys."""
    base = bases.named(str(sd1_folder))
    old = tmp_path / "old"
    shutil.copytree(sd1_folder, old)
    (path,) = bases.weights_files(old / "text_encoder")
    tensors, told = files.load(path)
    files.save(path, {f"text_model.{key}": value for key, value in tensors.items()}, told)
    modules = adapters.loras(base, only=lambda p: p.endswith("layers.0.mlp.fc1"))
    lora = files.save(tmp_path / "x.safetensors", kohya.to_kohya(modules), {})
    for name, folder in (("new", sd1_folder), ("older", old)):
        assert run("merge", "--lora", lora, "--into", folder, "--out", tmp_path / name)[0] == 0
    new, older = (
        files.load(bases.weights_files(tmp_path / n / "text_encoder")[0])[0] for n in ("new", "older")
    )
    assert len(new) == len(older) and all(
        torch.equal(older[f"text_model.{key}"], value) for key, value in new.items()
    )
    assert not torch.equal(new["encoder.layers.0.mlp.fc1.weight"], tensors["encoder.layers.0.mlp.fc1.weight"])


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_checkpoints_of_published_sizes(name: str) -> None:
    base = bases.named(name)
    shapes = rules_checkpoint.expected(base) | {"first_stage_model.x": (1,), "alphas_cumprod": (1000,)}
    whole = contents.Contents("x.safetensors", shapes, dict.fromkeys(shapes, "F16"), {}, {})
    identity = identify.identify(whole)
    assert identity.kind == "checkpoint" and bases.choose(None, whole, identity).name == name
    judged = {tool: account.judge(tool, whole, identity, base).loads for tool in account.tools_for(identity)}
    assert judged == dict.fromkeys(("diffusers", "ComfyUI", "A1111", "Forge", "kohya"), "all")
    key = "model.diffusion_model.out.2.weight"
    for fault in ({k: s for k, s in shapes.items() if k != key}, shapes | {f"{key}x": (1,)}):
        judged = {t: account.judge(t, whole._replace(shapes=fault), identity, base).loads for t in judged}
        assert set(judged.values()) == {"part"}


def test_checkpoint_of_the_tiny_bases(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    """Only diffusers knows a base of any size; the keys are those that the single-file export writes."""
    for family in ("sd1", "sd2", "sdxl"):
        folder = folders[family]
        places_ = original.PLACES[family]
        states = {name: bases.weights(folder / name) for name in places_}
        configs = {name: bases.config(folder / name) for name in places_}
        path = tmp_path / f"{family}.safetensors"
        files.save(path, original.to_original(states, configs, family), {})
        code, out, err = run("verify", path, "--base", folder)
        assert (code, err) == (0, ""), err
        loads = {line.split()[1]: line.split()[3] for line in out.replace(";", "").splitlines()}
        assert loads == dict.fromkeys(("diffusers", "ComfyUI", "A1111", "Forge", "kohya"), "nothing") | {
            "diffusers": "all"
        }
        tensors, _ = files.load(path)
        key = next(key for key in tensors if key.endswith("out.2.weight"))
        files.save(path, {k: v for k, v in tensors.items() if k != key}, {})
        code, _, err = run("verify", path, "--base", folder)
        assert code == 2 and f"missing: {key}" in err
