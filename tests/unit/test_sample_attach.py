"""LoRAs and words from files: each is read whole and works, or is an error that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export import adapter, files, kohya, lycoris
from tuner.files.merge import Part
from tuner.generate import attach
from tuner.generate.draw import Drawer, How
from tuner.generate.shown import Shown
from tuner.generate.words import Words

Fresh = Callable[[str], Any]
FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def picture(family: Any, words: Words | None = None, prompt: str = "a red toy") -> np.ndarray:
    words = words or Words(family, [])
    with torch.no_grad():
        texts = [words.encode(text, "") for text in (prompt, "")]
    drawer = Drawer(family, [], Shown((64, 64)), How("ddim", 2, 3.0))
    return drawer.draw(texts[:1], texts[1], [3], lambda: None)[0]


def weights(family: Any) -> dict[str, Tensor]:
    networks = {"unet": family.denoiser, **family.text_encoders}
    return {
        f"{name}.{key.replace('.base_layer', '').removesuffix('.weight')}": tensor.detach().clone()
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
        if key.endswith("weight") and ".lora_" not in key
    }


@pytest.fixture
def loras(fresh: Fresh, adapters: ModuleType, tmp_path_factory: Any) -> Any:
    """Kohya files on all linear layers and convolutions: a family's name and a seed -> its path."""

    def of(name: str, seed: int, rank: int = 2, scale: float = 0.5) -> Path:
        base = attach.base_of(fresh(name))
        made = adapters.loras(base, rank, scale, lambda path: "text_projection" not in path, seed)
        small = {path: m._replace(up=0.01 * m.up) for path, m in made.items()}
        tensors = kohya.to_kohya(small, kohya.naming(base.family, base.unet))
        place = tmp_path_factory.mktemp("loras") / f"{name}-{seed}.safetensors"
        return files.save(place, tensors, {"format": "pt"})

    return of


@pytest.mark.parametrize("name", FAMILIES)
def test_weight_0_is_the_base_bitwise(name: str, fresh: Fresh, loras: Callable[..., Path]) -> None:
    plain, zero, whole = (fresh(name) for _ in range(3))
    file = loras(name, 1)
    attach.add_loras(zero, [Part(file, 0.0)])
    attach.add_loras(whole, [Part(file, 1.0)])
    assert np.array_equal(picture(zero), picture(plain))
    assert np.abs(picture(whole).astype(int) - picture(plain)).max() > 3


@pytest.mark.parametrize("name", FAMILIES)
def test_loras_add_up_with_their_weights(name: str, fresh: Fresh, loras: Callable[..., Path]) -> None:
    """Beside the layers as in the weights themselves: W + 0.7 A + (-0.4) B."""
    family, added = (fresh(name) for _ in range(2))
    parts = [Part(loras(name, 1), 0.7), Part(loras(name, 2, rank=3, scale=1.0), -0.4)]
    base, old = attach.base_of(added), weights(added)
    attach.add_loras(family, parts)
    assert all(torch.equal(old[path], tensor) for path, tensor in weights(family).items())
    networks = {"unet": added.denoiser, **added.text_encoders}
    seen = 0
    for part in parts:
        for path, module in adapter.read(*files.load(part.path), base).modules.items():
            component, _, rest = path.partition(".")
            layer = networks[component].get_submodule(rest)
            change = lycoris.change(module, tuple(layer.weight.shape))
            layer.weight.data = (layer.weight.double() + part.weight * change).float()
            seen += 1
    assert seen == 2 * len(attach._read(parts[0], base).modules) > 100
    alone = fresh(name)
    attach.add_loras(alone, parts[:1])
    both, expected = picture(family).astype(int), picture(added)
    assert np.abs(both - expected).max() <= 1
    assert np.abs(both - picture(alone)).max() > 3


def test_ranks_and_alphas_of_each_module_are_heeded(
    fresh: Fresh, adapters: ModuleType, tmp_path: Path
) -> None:
    """diffusers alone would give them all the commonest alpha (formats.md)."""
    family = fresh("sd1")
    base = attach.base_of(family)
    first = adapters.loras(base, 2, 0.5, lambda path: "attn1" in path)
    tensors = kohya.to_kohya(first)
    tensors |= kohya.to_kohya(
        adapters.loras(base, 3, 2.0, lambda path: "attn2" in path or "text_" in path, 5)
    )
    file = files.save(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    old = {path: tensor.double() for path, tensor in weights(family).items()}
    attach.add_loras(family, [Part(file, 0.5)])
    found = 0
    from peft.tuners.lora import LoraLayer

    wanted = adapter.read(tensors, {}, base).modules
    for name, network in {"unet": family.denoiser, **family.text_encoders}.items():
        for path, layer in network.named_modules():
            if isinstance(layer, LoraLayer):
                delta = layer.get_delta_weight("lora0").double()
                change = 0.5 * lycoris.change(wanted[f"{name}.{path}"], tuple(old[f"{name}.{path}"].shape))
                torch.testing.assert_close(delta, change, rtol=1e-5, atol=1e-6)
                found += 1
    assert found == len(wanted) > 20 and {len(m.down) for m in wanted.values()} == {2, 3}


def test_what_diffusers_does_not_load_is_added_to_the_weights(fresh: Fresh, tmp_path: Path) -> None:
    family = fresh("sd1")
    base, old = attach.base_of(family), weights(family)
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    to_q, fc1 = (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.encoder.layers.0.mlp.fc1",
    )
    modules = {
        to_q: lycoris.LohaModule(some(64, 2), some(2, 64), some(64, 2), some(2, 64), scale=0.5),
        fc1: lycoris.LohaModule(some(64, 2), some(2, 32), some(64, 2), some(2, 32), scale=0.5),
    }
    tensors = lycoris.to_lycoris(modules, kohya.naming(base.family, base.unet))
    tensors |= {"lora_unet_conv_out.diff": some(4, 64, 3, 3), "lora_unet_conv_out.diff_b": some(4)}
    file = files.save(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    bias = family.denoiser.conv_out.bias.clone()
    attach.add_loras(family, [Part(file, -2.0)])
    new = weights(family)
    changed = {path for path, tensor in old.items() if not torch.equal(new[path], tensor)}
    assert changed == {to_q, fc1, "unet.conv_out"}
    for path, module in modules.items():
        change = -2.0 * lycoris.change(module, tuple(old[path].shape))
        torch.testing.assert_close(new[path].double(), old[path].double() + change, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(family.denoiser.conv_out.bias, bias - 2 * tensors["lora_unet_conv_out.diff_b"])


def test_a_text_encoders_feed_forward_layers_alone(
    fresh: Fresh, adapters: ModuleType, tmp_path: Path
) -> None:
    """diffusers refuses such a file in peft's names."""
    family = fresh("sd1")
    base, old = attach.base_of(family), weights(family)
    modules = adapters.loras(base, 2, 0.5, lambda path: "mlp.fc" in path)
    file = files.save(tmp_path / "x.safetensors", kohya.to_kohya(modules), {"format": "pt"})
    attach.add_loras(family, [Part(file, 1.0)])
    new = weights(family)
    assert {path for path in old if not torch.equal(new[path], old[path])} == modules.keys()
    assert len(modules) == 4


def test_a_dora_works_as_trained(fresh: Fresh, adapters: ModuleType, tmp_path: Path) -> None:
    family = fresh("sd1")
    base, old = attach.base_of(family), weights(family)
    modules = adapters.loras(base, 2, 0.5, lambda path: "attn1" in path or "self_attn" in path)
    norms = {path: 1.2 * old[path].flatten(1).norm(dim=1) for path in modules}
    tensors, told = adapter.to_peft(adapter.Adapter(dict(modules), norms))
    file = files.save(tmp_path / "x.safetensors", tensors, told)
    attach.add_loras(family, [Part(file, 1.0)])
    made = picture(family)
    added = fresh("sd1")
    networks = {"unet": added.denoiser, **added.text_encoders}
    for path, module in modules.items():
        component, _, rest = path.partition(".")
        difference = lycoris.from_dora(old[path], module, norms[path])
        networks[component].get_submodule(rest).weight.data = old[path] + difference.weight.float()
    assert len(modules) > 10
    assert np.abs(made.astype(int) - picture(added)).max() <= 1
    assert np.abs(made.astype(int) - picture(fresh("sd1"))).max() > 3


def test_loras_that_are_none_of_this_base_are_errors(
    fresh: Fresh, loras: Callable[..., Path], tmp_path: Path
) -> None:
    family, file = fresh("sd1"), loras("sd1", 1)
    tensors, told = files.load(file)
    old = weights(family)
    strange = {"lora_unet_up_blocks_9_x.lora_down.weight": torch.zeros(2, 2), **tensors}
    half = {key: tensor for key, tensor in tensors.items() if key != "lora_unet_conv_in.lora_up.weight"}
    for made, error in (
        (strange, r"1 of \d+ keys name no module of tiny-sd1: lora_unet_up_blocks_9_x.lora_down.weight"),
        (half, "unet.conv_in lacks up"),
        ({"<toy>": torch.zeros(2, 32)}, "expected a LoRA or kin, found embedding"),
    ):
        bad = files.save(tmp_path / "bad.safetensors", made, told)
        with pytest.raises(UserError, match=error) as caught:
            attach.add_loras(family, [Part(file, 1.0), Part(bad, 1.0)])
        assert str(caught.value).startswith("--lora bad.safetensors: ")
    assert all(torch.equal(old[path], tensor) for path, tensor in weights(family).items())
    assert not hasattr(family.denoiser, "peft_config"), "nothing is put on before all files are read"
    with pytest.raises(UserError, match="--lora sdxl-1.safetensors: "):
        attach.add_loras(family, [Part(loras("sdxl", 1), 1.0)])


def word_file(folder: Path, name: str, key: str, *tables: Tensor) -> Path:
    keys = [key] if len(tables) == 1 else ["clip_l", "clip_g"]
    return files.save(folder / name, dict(zip(keys, tables, strict=True)), {"format": "pt"})


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_word_reads_as_it_was_trained(
    name: str, fresh: Fresh, folders: dict[str, Path], models: ModuleType, tmp_path: Path
) -> None:
    trainer = models.family_of(folders[name], "textual_inversion")
    method = models.move(models.method_of("textual_inversion", trainer))
    (file,) = method.export(trainer, tmp_path, models.card_of(torch.float32, method))
    family = fresh(name)
    words = Words(family, [file])
    token = "toy" if name == "sdxl" else "<toy>"  # two tensors have no room for it in their keys
    assert list(words.spelled) == [token]
    with torch.no_grad():
        made = words.encode(f"a {token}, red", "")
        own = method.encode(trainer, trainer.tokenize(["a <toy> <toy>_1 <toy>_2, red"]))
        base = words.encode("a toyish toy, red" if name != "sdxl" else "a toyish one, red", "")
        plain = trainer.encode_prompts(
            trainer.tokenize(["a toyish toy, red" if name != "sdxl" else "a toyish one, red"])
        )
    for has, wants, other in zip(made, own, base, strict=True):
        assert (has is None) == (wants is None) == (name != "sdxl" and has is not made.hidden)
        if has is not None:
            assert torch.equal(has, wants) and not torch.equal(has, other)
    assert torch.equal(base.hidden, plain.hidden), "no other word is read otherwise"
    assert not np.array_equal(picture(family, words, f"a {token}"), picture(family, words, "a"))


def test_words_stand_for_themselves_alone(fresh: Fresh, tmp_path: Path) -> None:
    family = fresh("sd1")
    made = [
        word_file(tmp_path, "a.safetensors", "red", rows(1, 32, 0)),  # a word that the base knows
        word_file(tmp_path, "b.safetensors", "red-hot", rows(2, 32, 1)),
        word_file(tmp_path, "mine.safetensors", "emb_params", rows(1, 32, 2)[0]),
    ]
    words = Words(family, made)
    assert list(words.spelled) == ["red", "red-hot", "mine"]
    one, two, three = words.spelled.values()
    assert words.final("red, red-hot, reddish MINE mine.") == f"{one}, {two}, reddish MINE {three}."
    with torch.no_grad():
        text = words.encode("mine red-hot red", "").hidden
        ids = family.tokenize([words.final("mine red-hot red")]).ids[0, 0, :6].tolist()
    table = family.embedding("text_encoder").num_embeddings
    assert ids[1:5] == [table + 3, table + 1, table + 2, table] and text.shape == (1, 77, 32)
    words.check(["a mine", "red-hot and red"])
    with pytest.raises(UserError, match="no prompt has the word red-hot, so it has no effect"):
        words.check(["a mine", "red"])


def test_cut_prompts_are_told(fresh: Fresh, capfd: pytest.CaptureFixture[str]) -> None:
    words = Words(fresh("sdxl"), [])
    with torch.no_grad():
        words.encode("red " * 75, "prompt 1")
        assert capfd.readouterr().out == ""
        words.encode("red " * 80, "prompt 2")
    assert capfd.readouterr().out == "prompt 2: its last 5 tokens are cut; --windows 2 reads them all\n"


def test_words_of_another_base_are_errors(fresh: Fresh, tmp_path: Path) -> None:
    sd1, sdxl = (fresh(name) for name in ("sd1", "sdxl"))
    one = word_file(tmp_path, "one.safetensors", "<one>", rows(1, 32, 0))
    wide = word_file(tmp_path, "wide.safetensors", "<wide>", rows(1, 48, 0))
    pair = word_file(tmp_path, "pair.safetensors", "", rows(2, 32, 0), rows(2, 64, 1))
    same = word_file(tmp_path, "same.safetensors", "<one>", rows(1, 32, 0))
    for family, paths, error in (
        (sd1, [wide], "wide"),
        (sd1, [pair], "pair"),
        (sdxl, [one], "clip_l and clip_g"),
        (sd1, [one, same], "--embedding same.safetensors: the word <one> is another file's already"),
        (sd1, [tmp_path / "none.safetensors"], "no such file"),
    ):
        with pytest.raises(UserError, match=error):
            Words(family, paths)
