"""What the checks of exports are made of: bounds, copies, what metadata may say."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tuner.export import files
from tuner.verify import VerifyError, compare, public, scene


def test_metadata_is_the_cards_and_public(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2)}

    def checked(metadata: dict[str, str], expected: dict[str, str] | None = None) -> None:
        public.check_metadata(files.save(tmp_path / "a.safetensors", tensors, metadata), expected or {})

    checked(
        {"format": "pt", "tuner.recipe": '{"base": "owner/name", "text": "and/or a 1/2, ~ 5"}'},
        {"format": "pt"},
    )
    with pytest.raises(VerifyError, match="has no metadata"):
        checked({})
    with pytest.raises(VerifyError, match="tuner.base is None, expected 'x'"):
        checked({"format": "pt"}, {"tuner.base": "x"})
    with pytest.raises(VerifyError, match="not the hash"):
        checked({"modelspec.hash_sha256": "0x1"})
    private = [
        ('{"data": [{"path": "/data/pictures"}]}', "path of this machine"),
        ('{"data": "C:\\\\pictures"}', "path of this machine"),
        ('{"~/x": 1}', "path of this machine"),
        (f'"made in {Path.cwd()}"', "path of this machine"),
        (f"by {getpass.getuser()}", "name of the user"),
        (f"on {socket.gethostname()}", "name of the user"),
    ]
    for value, message in private:
        with pytest.raises(VerifyError, match=message):
            checked({"tuner.versions": value})
    checked({"tuner.recipe": f'"a {getpass.getuser()} on {socket.gethostname()}"'})  # the user's own words


def test_the_bound_of_an_effect() -> None:
    base, change = torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert compare.same_effect("x", base + change, base + change, base, torch.float32) == 0
    half = compare.same_effect("x", base + 1.01 * change, base + change, base, torch.float16)
    assert half == pytest.approx(0.01, rel=1e-5)
    for factor, dtype in ((1.03, torch.float16), (1.001, torch.float32), (float("nan"), torch.float16)):
        with pytest.raises(VerifyError, match="x: the export's effect is off by"):
            compare.same_effect("x", base + factor * change, base + change, base, dtype)
    with pytest.raises(VerifyError, match="changes nothing"):
        compare.same_effect("x", base, base + change, base, torch.float32)
    # An effect that is lost in float32's rounding of the whole is not asked for, one from nothing is.
    assert compare.same_effect("x", base, base + 1e-7 * change, base, torch.float16) == pytest.approx(1)
    assert compare.same_effect("x", base, base, base, torch.float16) == 0
    with pytest.raises(VerifyError, match="off by inf"):
        compare.same_effect("x", base + change, base, base, torch.float16)


def test_a_bare_copy_shares_nothing_and_has_no_adapters(sd1_folder: Path, models: ModuleType) -> None:
    plain = models.family_of(sd1_folder, "lora").denoiser
    family = models.family_of(sd1_folder, "lora")
    models.move(models.method_of("lora", family))
    copied = scene.bare_copy(family.denoiser)
    state = plain.state_dict()
    assert copied.state_dict().keys() == state.keys() and len(state) > 200
    assert all(torch.equal(tensor, state[name]) for name, tensor in copied.state_dict().items())
    assert not hasattr(copied, "peft_config") and hasattr(family.denoiser, "peft_config")
    own = {p.data_ptr() for p in family.denoiser.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in copied.parameters())


def test_a_forgetful_copy_is_the_tokeniser_before(sd1_folder: Path, models: ModuleType) -> None:
    before = models.family_of(sd1_folder, "lora").tokenizer
    after = models.family_of(sd1_folder, "lora").tokenizer
    after.add_tokens(["<toy>", "<toy>_1"])
    text = "a red <toy> <toy>_1 toy \u00e9"
    assert after(text)["input_ids"] != before(text)["input_ids"]
    copied = scene.forgetful_copy(after, ["<toy>", "<toy>_1"])
    assert copied(text)["input_ids"] == before(text)["input_ids"]
    assert copied.get_vocab() == before.get_vocab() and len(before) == 518
    assert (copied.bos_token_id, copied.eos_token_id, copied.pad_token_id) == (516, 517, 517)


def test_the_bound_of_a_reading() -> None:
    base, change = torch.ones(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
    for factor in (1.0, 1.0005):
        compare.same_reading("x", base + factor * change, base + change, base, torch.float16)
    for factor, dtype in ((1.002, torch.float16), (1.0005, torch.float32), (float("nan"), torch.bfloat16)):
        with pytest.raises(VerifyError, match="x is another one than the stored tensors give"):
            compare.same_reading("x", base + factor * change, base + change, base, dtype)


def test_rounded_tensors_come_back_bitwise() -> None:
    whole, tensor = torch.arange(3), torch.nn.Parameter(torch.tensor([1.0, 1 + 2**-20]))
    before, place = tensor.detach().clone(), tensor.data_ptr()
    with scene.rounded([whole, tensor], torch.float16):
        assert tensor.dtype == torch.float32 and tensor.tolist() == [1.0, 1.0]
    assert torch.equal(tensor, before) and tensor.data_ptr() == place
    assert whole.tolist() == [0, 1, 2]
