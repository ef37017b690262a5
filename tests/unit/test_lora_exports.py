"""The files of LoRA and kin: what is written, what proves it, and that each proof can fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tuner import verify
from tuner.adapters import exports
from tuner.export import contents as reading
from tuner.export import files, identify
from tuner.export.metadata import build
from tuner.files import account
from tuner.files.convert import convert
from tuner.files.write import DERIVED
from tuner.method import Card
from tuner.methods.lora import Config, Lora
from tuner.verify import VerifyError
from tuner.verify import lora as lora_check

PEFT, BAKED, LYCORIS = exports.PEFT, "case.safetensors", "lycoris/case.safetensors"
PATTERNS = [{"match": r"unet\..*conv.*", "rank": 2, "alpha": 1.0}, {"match": "text_encoder.*", "rank": 3}]
KINDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "lora": ({}, [BAKED]),
    "patterns": ({"targets": "all", "patterns": PATTERNS, "rslora": True, "alpha": 3.0}, [BAKED]),
    "dora": ({"kind": "dora", "targets": "all"}, [PEFT, BAKED]),
    "loha": ({"kind": "loha", "targets": "all", "tucker": True}, [LYCORIS]),
    "lokr": ({"kind": "lokr", "alpha": 3.0}, [LYCORIS]),
}
CASES = [
    (name, kind, dtype)
    for name in ("sd1", "sdxl")
    for kind in KINDS
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if dtype == torch.float16 or name == "sd1"
]


class Made(NamedTuple):
    """A method's export in a folder of its own."""

    family: Any
    method: Lora
    card: Card
    written: list[Path]

    def check(self) -> list[str]:
        return verify.check(self.family, [self.method], self.written, self.card)


@pytest.fixture
def make(folders: dict[str, Path], models: ModuleType, tmp_path: Path) -> Callable[..., Made]:
    def made(name: str, kind: str, dtype: torch.dtype = torch.float16, moved: bool = True) -> Made:
        family = models.family_of(folders[name], "lora")
        method = Lora(Config(**{"rank": 4, "text_encoder": True, **KINDS[kind][0]}), family, 3)
        method = models.move(method) if moved else method
        told = build(
            "lora",
            name="case",
            recipe_text="{}",
            versions={},
            base_name=name,
            base_digest="0",
            data_digests={},
            extra={"family": name, **method.labels()},
        )
        card = Card("case", dtype, {"lora": told})
        return Made(family, method, card, method.export(family, tmp_path / "export", card))

    return made


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES, ids=str)
def test_an_export_has_the_trained_effect(
    name: str, kind: str, dtype: torch.dtype, make: Callable[..., Made], tmp_path: Path
) -> None:
    made = make(name, kind, dtype)
    places = [path.relative_to(tmp_path / "export").as_posix() for path in made.written]
    assert places == KINDS[kind][1]
    lines = made.check()
    assert len(lines) == len(places)
    for place, line in zip(places, lines, strict=True):
        count = len(files.load(tmp_path / "export" / place)[0])
        assert f"all {count} keys" in line and count > 60
        tools = {PEFT: "", BAKED: "ComfyUI, A1111, Forge and kohya", LYCORIS: "ComfyUI, A1111 and Forge"}[
            place
        ]
        tools = "ComfyUI, A1111 and Forge" if kind == "dora" and place == BAKED else tools
        assert f"{tools} load all of it by their rules" in line or not tools
        assert ("loaded by diffusers" in line) == (kind in ("lora", "patterns") or place == PEFT)


def halves(path: Path) -> tuple[dict[str, Any], bytes]:
    """A file's header, and all bytes after it."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_an_alpha_is_float32_in_every_precision(
    kind: str,
    dtype: torch.dtype,
    make: Callable[..., Made],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(KINDS, "odd", ({"kind": kind, "rank": 3, "alpha": 5.3}, []))
    made = make("sd1", "odd", dtype)
    (path,) = made.written
    tensors, header = files.load(path)
    alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
    others = {tensor.dtype for key, tensor in tensors.items() if not key.endswith(".alpha")}
    assert len(alphas) == len(made.method.slots) > 20 and others == {dtype}
    assert all(torch.equal(alpha, torch.tensor(5.3, dtype=torch.float32)) for alpha in alphas)
    assert float(header["ss_network_alpha"]) == torch.tensor(5.3, dtype=torch.float32).item()
    assert len(made.check()) == 1
    if kind == "lora":  # the others have no form in peft's names
        middle, last = tmp_path / "peft.safetensors", tmp_path / "there and back" / path.name
        convert(path, "peft", middle, str(folders["sd1"]))
        convert(middle, "kohya", last, str(folders["sd1"]))
        (header, data), (again, same) = halves(path), halves(last)
        assert data == same  # byte by byte
        assert "of case" in again["__metadata__"].pop(DERIVED)  # its only news
        assert again == header and len(header) == len(tensors) + 1


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_an_untrained_adapter_passes_too(kind: str, make: Callable[..., Made]) -> None:
    made = make("sd1", kind, moved=False)
    assert len(made.check()) == len(KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_is_that_of_the_file(kind: str, make: Callable[..., Made], tmp_path: Path) -> None:
    made = make("sdxl", kind, torch.float32)
    told = {place: files.load(tmp_path / "export" / place)[1] for place in KINDS[kind][1]}
    for place, header in told.items():
        baked = kind == "dora" and place == BAKED
        plain = kind in ("lora", "patterns") or place == PEFT
        assert header["ss_network_module"] == ("networks.lora" if plain else "lycoris.kohya")
        assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert ("lora_adapter_metadata" in header) == (place == PEFT)
        assert ("ss_network_dim" in header) == (not baked)
        identity = identify.identify(reading.read(tmp_path / "export" / place))
        names = {"lora": "LoRA", "patterns": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
        assert identity.kind == ("full differences" if baked else names[kind])
        assert identity.family == "sdxl"
        if "ss_network_dim" in header:
            assert max(identity.ranks) == int(header["ss_network_dim"])
            assert float(header["ss_network_alpha"]) in identity.alphas
    assert len(made.written) == len(told)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tools_rules_account_for_every_key(
    name: str, kind: str, make: Callable[..., Made], folders: dict[str, Path]
) -> None:
    made = make(name, kind)
    forms = made.method.forms("case")
    assert len(forms) == len(made.written)
    for form, path in zip(forms, made.written, strict=True):
        lines = account.check(path, str(folders[name]), form.tools)
        assert len(lines) == len(form.tools) and all("loads all " in line for line in lines)


def drop(ending: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(next(key for key in sorted(tensors) if key.endswith(ending)))


def scale(ending: str, by: float) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if key.endswith(ending))
        tensors[key] = tensors[key] * by

    return change


DAMAGED = [
    ("dora", PEFT, drop("lora_magnitude_vector.weight"), "1 missing (text_encoder."),
    ("dora", PEFT, drop("lora_magnitude_vector"), "1 missing (unet."),
    ("dora", PEFT, scale("lora_magnitude_vector", 1.01), "is not what was trained"),
    ("dora", PEFT, scale("lora_B.weight", 1.01), "is not what was trained"),
    ("dora", BAKED, drop(".diff"), "1 missing (lora_te_"),
    ("dora", BAKED, scale(".diff", -1), "is not what was trained"),
    ("loha", LYCORIS, drop("hada_w1_a"), "1 missing"),
    ("loha", LYCORIS, scale(".alpha", 0.5), "alpha is not what was trained"),
    ("lokr", LYCORIS, scale("lokr_w1", 1.01), "lokr_w1 is not what was trained"),
    ("lokr", LYCORIS, lambda t: t.update({k: v.float() for k, v in t.items()}), "is float32"),
    ("patterns", BAKED, scale("lora_up.weight", 1.01), "changes its layer otherwise"),
]


@pytest.mark.parametrize(
    ("kind", "place", "change", "message"),
    DAMAGED,
    ids=lambda value: value[:30] if isinstance(value, str) else "damaged",  # a function's name has an address
)
def test_a_damaged_file_is_named(
    kind: str, place: str, change: Any, message: str, make: Callable[..., Made], tmp_path: Path
) -> None:
    made = make("sd1", kind)
    path = tmp_path / "export" / place
    tensors, told = files.load(path)
    change(tensors)
    told["modelspec.hash_sha256"] = f"0x{files.data_digest(tensors)}"
    files.save(path, tensors, told)
    with pytest.raises(VerifyError) as caught:
        made.check()
    assert message in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "place", "ending"), [("loha", LYCORIS, "hada_w2_b"), ("dora", BAKED, ".diff")]
)
def test_a_files_effect_is_compared_beside_its_tensors(
    kind: str,
    place: str,
    ending: str,
    make: Callable[..., Made],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = make("sd1", kind)
    path = tmp_path / "export" / place
    tensors, told = files.load(path)
    for key in tensors:
        if key.endswith(ending):
            tensors[key] = tensors[key] * 1.2
    files.save(path, tensors, told)
    monkeypatch.setattr(lora_check, "same_tensors", lambda *_: 1)
    with pytest.raises(VerifyError, match="the export's effect is off by 0"):
        made.check()


def test_the_scale_of_a_dora_is_in_the_metadata(
    make: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("sd1", "dora")
    path = tmp_path / "export" / PEFT
    tensors, told = files.load(path)
    told["lora_adapter_metadata"] = told["lora_adapter_metadata"].replace(
        '"unet.lora_alpha": 4', '"unet.lora_alpha": 8'
    )
    files.save(path, tensors, told)
    with pytest.raises(VerifyError, match="loaded by diffusers,: lora_unet.* changes its layer otherwise"):
        made.check()
    monkeypatch.setattr(lora_check, "_same_layers", lambda *_: None)
    with pytest.raises(VerifyError, match="the prediction is another one than the stored tensors give"):
        made.check()


def test_a_tool_that_would_not_load_a_file_is_named(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make("sd1", "lokr")
    forms = [form._replace(tools=("ComfyUI", "kohya")) for form in made.method.forms("case")]
    monkeypatch.setattr(made.method, "forms", lambda _: forms)
    with pytest.raises(
        VerifyError, match="not every tool that it is for .*\n  kohya would load nothing of it"
    ):
        made.check()


def test_metadata_that_another_form_of_the_adapter_has_is_an_error(
    make: Callable[..., Made], tmp_path: Path
) -> None:
    made = make("sd1", "dora")
    path = tmp_path / "export" / BAKED
    tensors, told = files.load(path)
    files.save(path, tensors, told | {"ss_network_dim": "4"})
    with pytest.raises(VerifyError, match="metadata ss_network_dim is '4', expected None"):
        made.check()
    shutil.rmtree(tmp_path / "export")
    with pytest.raises(VerifyError, match="is not there"):
        made.check()


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_the_trainer_is_left_as_it_was(kind: str, make: Callable[..., Made]) -> None:
    made = make("sd1", kind)
    made.family.cast(torch.bfloat16, made.method.parameters())
    made.method.train_mode(True)
    networks = [*made.family.modules().values(), made.method]
    tensors = {id(p): (p, p.detach().clone(), p.requires_grad) for n in networks for p in n.parameters()}
    modes = [(m, m.training) for n in networks for m in n.modules()]
    state = torch.get_rng_state()
    again = made.method.export(made.family, made.written[0].parents[1], made.card)
    verify.check(made.family, [made.method], again, made.card)
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training == mode for module, mode in modes) and len(modes) > 100
    assert len(tensors) > 200
    assert all(torch.equal(p, was) and p.requires_grad == flag for p, was, flag in tensors.values())
