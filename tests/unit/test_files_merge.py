"""`tuner merge | extract | resize`: what the changes of weights come to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from tuner.errors import UserError
from tuner.export import adapter, files, kohya, lycoris
from tuner.export.places import Base
from tuner.files import bases, lowrank, merge

Run = Callable[..., tuple[int, str, str]]


def inner(path: str) -> bool:
    """Layers that every tool adapts."""
    return "projection" not in path and (not path.startswith("unet.") or "_block" in path)


def changes(path: Path, base: Base) -> dict[str, Tensor]:
    layers = base.layers()
    found = adapter.read(*files.load(path), base).modules
    return {place: lycoris.change(module, layers[place]) for place, module in found.items()}


def test_merge_of_loras_is_exact(
    run: Run, folder: Path, tmp_path: Path, write_lora: Callable[..., Any]
) -> None:
    base = bases.named(str(folder))
    for name, rank, scale, seed in (("a", 4, 2.0, 1), ("b", 2, 0.5, 2)):
        write_lora(tmp_path / f"{name}.safetensors", base, rank=rank, scale=scale, seed=seed)
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "sum"))
    code, line, err = run("merge", "--lora", a, "--lora", f"{b}:-0.5", "--out", out, "--base", folder)
    assert (code, err) == (0, "") and line.splitlines()[0].endswith("modules of rank 6")
    first, second, found = (changes(path, base) for path in (a, b, out))
    assert found.keys() == first.keys() and len(found) > 40
    for place, change in found.items():  # scales are powers of two: nothing is rounded
        torch.testing.assert_close(change, first[place] - 0.5 * second[place], rtol=0, atol=1e-12)
    told = files.load(out)[1]
    assert told["modelspec.merged_from"] == "a, b" and told["ss_network_dim"] == "6"
    assert run("verify", out, "--base", folder)[0] == 0
    code, _, err = run("merge", "--lora", a, "--out", tmp_path / "y.safetensors", "--base", folder)
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
    more = ("--rank", 3, "--out", tmp_path / "y.safetensors")
    code, _, err = run("extract", folder / "unet", folder / "unet", *more)
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
    out = tmp_path / "same.safetensors"
    code, lines, _ = run("resize", lora, "--rank", 4, "--out", out, "--base", folder)
    assert code == 0 and "more than there is" not in lines
    for place, change in changes(out, base).items():
        torch.testing.assert_close(change, whole[place], rtol=1e-4, atol=1e-4)
    out = tmp_path / "energy.safetensors"
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
        code, _, err = run("resize", lora, *arguments, "--out", tmp_path / "y.safetensors", "--base", folder)
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
