"""Autoencoders that overflow: moved to float32; and what stays no number is never kept."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tuner.data import assemble, encode
from tuner.data.blob import File
from tuner.data.captions import CaptionRule
from tuner.data.index import Memory
from tuner.data.samples import Sample
from tuner.errors import UserError
from tuner.family import Family


@pytest.fixture
def family(models: ModuleType, sd1_folder: Path) -> Any:
    made = models.family_of(sd1_folder, "lora")
    made.digests = {name: name for name in ("vae", "text_encoder", "tokenizer")}
    return made


def swell(family: Any, factor: float) -> None:
    """Weights whose intermediate results exceed float16's largest number, 65504; groups norm them again."""
    with torch.no_grad():
        family.networks["vae"].encoder.conv_in.weight.mul_(factor)
        family.networks["vae"].decoder.conv_in.weight.mul_(factor)


def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_an_overflowing_half_autoencoder_goes_on_in_float32(
    family: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    swell(family, 2e5)
    vae = family.networks["vae"].half().float()  # as half precision holds it
    expected = family.encode_images(pixels())
    vae.half()
    found = family.encode_images(pixels())
    assert next(vae.parameters()).dtype == torch.float32
    assert capsys.readouterr().out == "the autoencoder overflows in float16; it goes on in float32\n"
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other) and bool(one.isfinite().all())
    family.encode_images(pixels())
    assert capsys.readouterr().out == ""  # said once


def test_decoding_too(family: Any, capsys: pytest.CaptureFixture[str]) -> None:
    swell(family, 2e5)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = family.networks["vae"].half().float()
    expected = family.decode_latents(latents)
    vae.half()
    assert torch.equal(family.decode_latents(latents), expected) and bool(expected.isfinite().all())
    assert "goes on in float32" in capsys.readouterr().out


def test_a_half_autoencoder_that_does_not_overflow_stays(
    family: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = family.encode_images(pixels())
    family.networks["vae"].half()
    found = family.encode_images(pixels())
    assert next(family.networks["vae"].parameters()).dtype == torch.float16
    assert capsys.readouterr().out == ""
    assert found.mean.dtype == torch.float32 and not torch.equal(found.mean, expected.mean)
    torch.testing.assert_close(found.mean, expected.mean, rtol=0.02, atol=0.02)


@pytest.fixture
def data(tmp_path: Path) -> list[Sample]:
    samples = []
    for number in range(3):
        place = tmp_path / f"{number}.png"
        Image.fromarray(np.full((32, 32, 3), 80 * number, np.uint8)).save(place)
        samples.append(Sample(File(place), (f"red toy {number}",)))
    return samples


def feed(family: Family, data: list[Sample], tmp_path: Path, text: bool = False) -> Any:
    wanted = assemble.Wanted(
        size=32,
        seed=0,
        crop="center",
        flip=False,
        captions=CaptionRule(),
        condition=None,
        cache=tmp_path / "cache",
        latents=not text,
        text=text,
    )
    opened = assemble.look_at(data, np.ones(3), wanted, Memory(tmp_path / "memory"))
    return encode.feed(opened, wanted, family)


def kept(folder: Path) -> int:
    """How many entries a cache holds."""
    return sum(len(load_file(shard)) for shard in folder.rglob("*.safetensors"))


def test_a_picture_that_stays_no_number_is_named_and_not_kept(
    family: Any, data: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(family).encode_images

    def broken(self: Any, pixels: torch.Tensor) -> Any:
        moments = real(self, pixels)
        moments.std[pixels.mean(dim=(1, 2, 3)) > 0.2] = torch.inf  # the third one
        return moments

    monkeypatch.setattr(type(family), "encode_images", broken)
    with pytest.raises(
        UserError, match=r"2\.png: the autoencoder makes no finite numbers of it; take another"
    ):
        feed(family, data, tmp_path)
    assert kept(tmp_path / "cache" / "latents") == 0
    monkeypatch.undo()
    feed(family, data, tmp_path)
    assert kept(tmp_path / "cache" / "latents") == 3


def test_a_caption_that_is_no_number_is_named_and_not_kept(
    family: Any, data: list[Sample], tmp_path: Path
) -> None:
    with torch.no_grad():
        family.embedding("text_encoder").weight[family.tokenize(["toy"]).ids[0, 0, 1]] = torch.nan
    data = [data[0]._replace(captions=("red",)), data[1], data[2]._replace(captions=("red red",))]
    with pytest.raises(UserError, match="the caption 'red toy 1': the text encoder makes no finite numbers"):
        feed(family, data, tmp_path, text=True)
    assert kept(tmp_path / "cache" / "text") == 0
