"""ControlNets from files: each is read whole in every layout, or is an error that says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tuner.errors import UserError
from tuner.export import cldm, files
from tuner.generate import attach
from tuner.method import public_config

Fresh = Callable[[str], Any]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl", "sd1_inpaint"])
def test_control_nets_of_every_layout(
    base: str, fresh: Fresh, folders: dict[str, Path], models: ModuleType, tmp_path: Path
) -> None:
    trainer = models.family_of(folders[base], "controlnet")
    method = models.move(models.method_of("controlnet", trainer), by=0.05)
    whole, single = method.export(trainer, tmp_path, models.card_of(torch.float32, method))
    tensors, told = files.load(whole)
    names = files.save(tmp_path / "names.safetensors", tensors, told)
    bare = {key.removeprefix(cldm.PREFIX): tensor for key, tensor in files.load(single)[0].items()}
    short = files.save(tmp_path / "short.safetensors", bare, told)
    family, wanted = fresh(base), method.branch.state_dict()
    assert len(wanted) > 50
    for path in (whole.parent, single, names, short):
        found = attach.load_net(family, path).state_dict()
        assert found.keys() == wanted.keys(), path.name
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items()), path.name


def test_control_nets_that_are_not_whole_or_of_another_base(
    fresh: Fresh, folders: dict[str, Path], models: ModuleType, tmp_path: Path
) -> None:
    trainer = models.family_of(folders["sd1"], "controlnet")
    method = models.method_of("controlnet", trainer)
    whole, single = method.export(trainer, tmp_path / "x", models.card_of(torch.float32, method))
    tensors, told = files.load(single)
    first = sorted(tensors)[0]
    half = files.save(tmp_path / "half.safetensors", {k: t for k, t in tensors.items() if k != first}, told)
    more = files.save(tmp_path / "more.safetensors", {**tensors, "control_model.x": torch.zeros(1)}, told)
    word = {"<one>": torch.randn(1, 32, generator=torch.Generator().manual_seed(0))}
    vectors = files.save(tmp_path / "one.safetensors", word, {"format": "pt"})
    sd1, sd2 = (fresh(name) for name in ("sd1", "sd2"))
    config = json.loads((whole.parent / "config.json").read_text())
    other = {**config, "block_out_channels": [64, 64, 64]}
    for family, path, error in (
        (sd1, half, rf"half.safetensors: {first}, of \d+ keys, is missing in a ControlNet of tiny-sd1"),
        (sd1, more, r"more.safetensors: control_model.x, of \d+ keys, has no place in"),
        (sd2, single, "has another size in a ControlNet of tiny-sd2"),
        (sd1, vectors, "one.safetensors: expected a ControlNet, found embedding"),
        (
            sd1,
            folders["sd1"] / "unet",
            "expected the folder of a ControlNetModel, found UNet2DConditionModel",
        ),
        (sd1, tmp_path, "expected the folder of a ControlNetModel, found no config.json"),
        (sd1, tmp_path / "none", "there is no such file"),
        (fresh("sdxl"), whole.parent, "was made for another base"),
    ):
        with pytest.raises(UserError, match=error):
            attach.load_net(family, path)
    assert public_config(attach.load_net(sd1, whole.parent))["block_out_channels"] == [64, 64]
    files.save(
        whole, {k: t for k, t in files.load(whole)[0].items() if "mid_block.attentions" not in k}, told
    )
    with pytest.raises(UserError, match=r"loads only in part; mid_block\.attentions.* and \d+ more"):
        attach.load_net(sd1, whole.parent)
    (whole.parent / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="--controlnet"):
        attach.load_net(sd1, whole.parent)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("net:look.png", ("net", 1.0, "look.png")),
        ("a/b.safetensors:0.5:c/d.png", ("a/b.safetensors", 0.5, "c/d.png")),
        ("run:-2:x.png", ("OWN", -2.0, "x.png")),
        ("run:x.png", ("OWN", 1.0, "x.png")),
    ],
)
def test_control_nets_are_parsed(text: str, wanted: tuple[str, float, str]) -> None:
    net = attach.parse_net(text, Path("OWN"), "mine")
    assert (str(net.path), net.scale, str(net.picture)) == wanted
    assert net.name == ("mine" if text.startswith("run") else Path(wanted[0]).name)


def test_a_folder_may_have_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:1").mkdir()
    assert attach.parse_net(f"{tmp_path / 'a:1'}:x.png", None, "").path == tmp_path / "a:1"


@pytest.mark.parametrize(
    "text, error",
    [
        ("net", "expected NET:PICTURE or NET:SCALE:PICTURE"),
        ("net:", "expected NET:PICTURE"),
        ("net:half:x.png", "the scale 'half' is no number"),
        ("run:x.png", "`run` is the ControlNet that a --run trained; here is none"),
    ],
)
def test_mistakes_in_control_nets(text: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        attach.parse_net(text, None, "")
