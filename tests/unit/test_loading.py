"""What a base is loaded in: the recipe's precision where it stays frozen, without a float32 copy beside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from tuner import base, build, components, recipe, sample, stable_diffusion
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.family import Options

HALF = torch.bfloat16
NEEDS = ("unet", "vae", "text_encoder")


@pytest.fixture
def load(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    def loaded(name: str, needs: tuple[str, ...] = NEEDS, new: Any = (), **options: Any) -> Any:
        hashes = Hashes(tmp_path / "hashes")
        return base.load(str(folders[name]), None, new, needs, 0, hashes, Options(**options))

    return loaded


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("exact", [(), ("text_encoder",), ("unet",)])
def test_frozen_networks_are_asked_for_in_the_precision_that_they_are_held_in(
    name: str, exact: tuple[str, ...], load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    real = components.load

    def loaded(part: str, place: Path, dtype: torch.dtype) -> Any:
        asked[part] = dtype
        return real(part, place, dtype)

    monkeypatch.setattr(components, "load", loaded)
    whole = load(name)
    asked.clear()
    family = load(name, hold=HALF, exact=exact)
    encoders = ["text_encoder", "text_encoder_2"] if name == "sdxl" else ["text_encoder"]
    precise = {"vae", *(["unet"] if "unet" in exact else []), *(encoders if "text_encoder" in exact else [])}
    assert asked == {part: torch.float32 if part in precise else HALF for part in ("unet", "vae", *encoders)}
    count = 0
    for part, network in family.modules().items():
        wanted = whole.modules()[part].state_dict()
        assert wanted.keys() == network.state_dict().keys()
        for key, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                assert tensor.dtype == asked[part], (part, key)
            assert torch.equal(tensor, wanted[key].to(tensor.dtype)), (part, key)
            count += 1
    assert count > 300


class Made(TorchDispatchMode):
    """Notes how many float32 numbers operations made that were not on the meta device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor) and one.dtype == torch.float32 and one.device.type == "cpu":
                self.count += one.numel()
        return out


def test_no_float32_copy_is_made_of_a_unet_in_half_precision(sd1_folder: Path, tmp_path: Path) -> None:
    source, place = sd1_folder / "unet", tmp_path / "unet"
    place.mkdir()
    (place / "config.json").write_bytes((source / "config.json").read_bytes())
    file = "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(source / file)
    safetensors.torch.save_file({key: tensor.to(HALF) for key, tensor in tensors.items()}, place / file)
    size = sum(tensor.numel() for tensor in tensors.values())
    made = {}
    for dtype in (HALF, torch.float32):
        with Made() as counter:
            unet = components.load("unet", place, dtype)
        assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
        made[dtype] = counter.count
    assert made[torch.float32] >= size > 100_000  # a copy of every tensor is counted
    assert made[HALF] < size / 1000


@pytest.mark.parametrize("shards", [False, True])
def test_a_file_of_another_precision_is_let_go_of_while_it_is_read(
    shards: bool, sd1_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    whole = UNet2DConditionModel.from_pretrained(sd1_folder / "unet", torch_dtype=HALF)
    place = sd1_folder / "unet"
    if shards:
        place = tmp_path / "unet"
        UNet2DConditionModel.from_pretrained(sd1_folder / "unet").save_pretrained(
            place, max_shard_size="500KB"
        )
    opened: list[int] = []
    real = components.safe_open

    class Counted:
        """A file that counts what is read of it before it is closed."""

        def __init__(self, path: Path, framework: str) -> None:
            self.file = real(path, framework=framework)

        def __enter__(self) -> Counted:
            self.file.__enter__()
            self.read = 0
            return self

        def __exit__(self, *about: Any) -> None:
            opened.append(self.read)
            self.file.__exit__(*about)

        def get_tensor(self, key: str) -> torch.Tensor:
            tensor: torch.Tensor = self.file.get_tensor(key)
            self.read += tensor.nbytes
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(components, "safe_open", Counted)
    monkeypatch.setattr(components, "GROUP", 100_000)
    monkeypatch.setattr(components, "_loaded", None)  # from_pretrained is not asked
    unet = components.load("unet", place, HALF)
    largest = max(4 * tensor.numel() for tensor in whole.state_dict().values())
    reads = [count for count in opened if count]
    assert len(reads) > 5 and max(reads) <= 100_000 + largest
    assert sum(reads) == 4 * sum(tensor.numel() for tensor in whole.state_dict().values())
    assert not unet.training and unet.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[key]) for key, tensor in unet.state_dict().items())
    x, t, text = torch.randn(1, 4, 8, 8).to(HALF), torch.tensor([3]), torch.randn(1, 5, 32).to(HALF)
    assert torch.equal(unet(x, t, text).sample, whole(x, t, text).sample)


def test_a_file_that_does_not_fit_is_left_to_the_library(sd1_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "unet"
    place.mkdir()
    with pytest.raises(UserError, match=r"the component unet is missing \(no unet/config\.json\)"):
        components.load("unet", place, HALF)
    (place / "config.json").write_bytes((sd1_folder / "unet" / "config.json").read_bytes())
    with pytest.raises(UserError, match="the component unet does not load"):
        components.load("unet", place, HALF)
    file = "diffusion_pytorch_model.safetensors"
    (place / file).write_bytes((sd1_folder / "unet" / file).read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole .safetensors file: "):
        components.load("unet", place, HALF)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd1_inpaint"])
def test_a_branch_begins_with_the_files_numbers(name: str, load: Callable[..., Any]) -> None:
    states = []
    for hold in (torch.float32, HALF):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            states.append(load(name, ("unet",), hold=hold).control_branch(3).state_dict())
    assert states[0].keys() == states[1].keys() and len(states[0]) > 60
    for key, tensor in states[0].items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, states[1][key]), key


def test_some_tensors_of_a_component(sd1_folder: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(sd1_folder / "unet")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="500KB")
    assert len(list((tmp_path / "unet").glob("*-of-*.safetensors"))) > 1
    state = unet.state_dict()
    for place in (sd1_folder / "unet", tmp_path / "unet"):
        found = components.tensors(place, ["conv_in.weight", "conv_out.bias"])
        assert found.keys() == {"conv_in.weight", "conv_out.bias"}
        assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())
    with pytest.raises(UserError, match=r"conv_inn\.weight is missing \(1 of 2 tensors\)"):
        components.tensors(tmp_path / "unet", ["conv_in.weight", "conv_inn.weight"])


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_adapters_begin_with_the_same_numbers_on_a_base_in_half_precision(
    kind: str, load: Callable[..., Any]
) -> None:
    from tuner.methods import lora

    states, weights = [], []
    for hold in (torch.float32, HALF):
        family = load("sd1", hold=hold)
        before = {key: tensor.clone() for key, tensor in family.denoiser.state_dict().items()}
        config = lora.Config(rank=4, kind=kind, text_encoder=True, targets="all-linear")
        method = lora.Lora(config, family, 3)
        states.append(method.tensors())
        after = {key.replace(".base_layer", ""): t for key, t in family.denoiser.state_dict().items()}
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items()) and len(before) > 100
        weights.append({tensor.dtype for tensor in before.values()})
    assert weights == [{torch.float32}, {HALF}]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 60
    for key, tensor in states[0].items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, states[1][key]), key
    assert any(bool((tensor != tensor.to(HALF)).any()) for tensor in states[1].values())


METHODS: dict[str, tuple[str, ...]] = {
    "lora: {rank: 4}": (),
    "lora: {rank: 4, kind: dora}": ("text_encoder", "unet"),
    "lora: {rank: 4, init: orthogonal}": ("text_encoder", "unet"),
    "lora: {rank: 4, merge: [{file: a.safetensors}]}": ("text_encoder", "unet"),
    "textual_inversion: {token: <a>, init: random}": ("text_encoder",),
    "controlnet: {}": (),
    "controlnet: {unlock_decoder_at: 3}": ("unet",),
    "full: {}": ("unet",),
    "full: {text_encoder: true}": ("text_encoder", "unet"),
    "full: {unet: false, text_encoder: true}": ("text_encoder",),
    "autoencoder: {}": ("vae",),
}
RECIPE = """
base: {{path: {base}}}
method: {{{method}}}
data: {{source: {pictures}, resolution: 32}}
train: {{steps: 2, batch_size: 2, learning_rate: 1e-3, warmup: 0, precision: bf16, threads: 1}}
preview: {{every: 0}}
log: {{tensorboard: false}}
output: {output}
"""


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_or_started_from_is_loaded_exactly(method: str, tmp_path: Path) -> None:
    import importlib

    place = tmp_path / "recipe.yaml"
    place.write_text(RECIPE.format(base="embedded", method=method, pictures="x", output="out"))
    loaded = recipe.load(place)
    kinds = {name: importlib.import_module(f"tuner.methods.{name}").METHOD for name in loaded.method}
    options = build.base_options(loaded, SimpleNamespace(mixed_precision="bf16"), kinds)  # type: ignore[arg-type]
    assert (options.hold, options.exact) == (HALF, METHODS[method])
    assert options.dtype("vae") == torch.float32  # whatever is asked for
    plain = build.base_options(loaded, SimpleNamespace(mixed_precision="no"), kinds)  # type: ignore[arg-type]
    assert plain.hold == torch.float32


@pytest.fixture
def one_process() -> Iterator[None]:
    """Accelerate keeps one state for a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    "method",
    [
        "lora: {rank: 2}",
        "lora: {rank: 2, text_encoder: true}, textual_inversion: {token: <toy>, init: toy}",
        "controlnet: {condition: canny}",
    ],
)
def test_runs_in_half_precision(
    method: str,
    one_process: None,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    sd1_folder: Path,
) -> None:
    """From loading to the proof of the exports."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a red <toy>" if "token" in method else "a red toy")
    place = tmp_path / "recipe.yaml"
    about = {"base": sd1_folder, "pictures": pictures, "output": tmp_path / "run"}
    place.write_text(RECIPE.format(method=method, **about))
    code, out, err = run("train", place)
    assert code == 0, err
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) > 2 and "bf16" in out + err


def test_pictures_are_decoded_a_few_at_a_time(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load("sd1", ("vae",))
    vae = family.modules()["vae"]
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))  # of 32 pixels
    whole = family.decode_latents(latents)
    counts: list[int] = []
    real = vae.decode
    monkeypatch.setattr(vae, "decode", lambda part: (counts.append(len(part)), real(part))[1])
    for pixels, wanted in ((2 * 32 * 32, [2, 2, 1]), (32 * 32 - 1, [1] * 5), (1024 * 1024, [5])):
        monkeypatch.setattr(stable_diffusion, "DECODED", pixels)
        counts.clear()
        parts = family.decode_latents(latents)
        assert counts == wanted and parts.shape == (5, 3, 32, 32)
        assert torch.allclose(parts, whole, atol=1e-5)
    assert {size: sample.pictures_at_once(size) for size in (64, 512, 768, 1024, 4096)} == {
        64: 16, 512: 16, 768: 7, 1024: 4, 4096: 1,
    }  # fmt: skip
