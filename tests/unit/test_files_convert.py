"""`tuner convert` on adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from tuner.export import adapter, files, lycoris, peft_format
from tuner.files import bases

Run = Callable[..., tuple[int, str, str]]


def equal(one: Path, other: Path) -> bool:
    (a, _), (b, _) = files.load(one), files.load(other)
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def test_convert_there_and_back_is_exact(run: Run, lora: Path, folder: Path, tmp_path: Path) -> None:
    for to in ("peft", "diffusers"):
        middle = tmp_path / f"{to}.safetensors"
        code, out, err = run("convert", lora, "--to", to, "--out", middle, "--base", folder)
        assert (code, err) == (0, "") and "modules in peft's names" in out
        assert peft_format.METADATA in files.load(middle)[1]
        for back in ("kohya", "comfy", "a1111"):
            last = tmp_path / f"{to}-{back}.safetensors"
            assert run("convert", middle, "--to", back, "--out", last, "--base", folder)[0] == 0
            assert equal(last, lora)
    told = files.load(last)[1]
    assert (
        peft_format.METADATA not in told
        and told["ss_network_dim"] == "4"
        and told["ss_network_alpha"] == "8.0"
    )
    assert told["modelspec.title"] == told["ss_output_name"] == "diffusers-a1111"
    assert told["tuner.derived"] == "convert to a1111 of diffusers (convert to diffusers of x)"
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
