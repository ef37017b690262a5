"""Words in a LoRA's file (`bundle_emb.NAME.*`): which tool reads them there, and what `tuner verify` says."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tuner import cli
from tuner.export import contents, embedding, files, kohya, metadata, rules
from tuner.export.places import Base
from tuner.files import bases

Tensors = dict[str, Tensor]
MEANT = {"A1111", "ComfyUI"}
ALL = MEANT | {"diffusers", "Forge", "kohya"}


def lora_of(base: Base, adapters: ModuleType) -> Tensors:
    modules = adapters.loras(base, 4, only=lambda path: ".attn" in path)
    return kohya.to_kohya(modules, kohya.naming(base.family, base.unet))


def word(base: Base, vectors: int = 2) -> Tensors:
    """A word's file on a base, as the exporter writes it."""
    tables = [
        torch.ones(vectors, shape[1])
        for tensors in (base.tensors[name] for name in base.tensors if name.startswith("text_encoder"))
        for name, shape in tensors.items()
        if name.endswith("token_embedding.weight")
    ]
    return embedding.to_file("<toy>", *tables)


def verdicts(tensors: Tensors, base: Base) -> dict[str, rules.Verdict]:
    labels = metadata.labels_of(base.family, None)
    told = {
        "ss_base_model_version": labels.base_version,
        "ss_v2": labels.v2,
        "modelspec.architecture": f"{labels.architecture}/lora",
    }
    found = {tool: rules.judge(tool, contents.of(tensors, told, "case.safetensors"), base) for tool in ALL}
    assert len(found) == 5
    return found


def test_one_word(folder: Path, adapters: ModuleType) -> None:
    base = bases.named(str(folder))
    lora = lora_of(base, adapters)
    tensors = embedding.bundle(lora, {"toy": word(base)})
    bundled = tensors.keys() - lora.keys()
    assert len(bundled) == (2 if base.family == "sdxl" else 1)
    found = verdicts(tensors, base)
    assert {tool: one.loads for tool, one in found.items()} == {
        "A1111": "all",
        "ComfyUI": "all",
        "diffusers": "nothing",
        "Forge": "part",
        "kohya": "part",
    }
    assert not any(one.faulty for one in found.values())
    assert {tool for tool, one in found.items() if one.unmeant} == ALL - MEANT
    for tool in ALL - MEANT:
        assert found[tool].unmeant == bundled and f"not meant for {tool}" in found[tool].cautions[0]
    assert found["Forge"].dropped.keys() == found["kohya"].dropped.keys() == bundled
    assert found["A1111"].cautions == []
    (caution,) = found["ComfyUI"].cautions
    assert "`lora key not loaded`" in caution and "embedding:case" in caution


def test_several_words(folder: Path, adapters: ModuleType) -> None:
    """ComfyUI puts the vectors of all words of a file one behind another: no file for it."""
    base = bases.named(str(folder))
    lora = lora_of(base, adapters)
    tensors = embedding.bundle(lora, {"toy": word(base), "cat": word(base, 1)})
    found = verdicts(tensors, base)
    assert found["A1111"].loads == "all" and found["ComfyUI"].loads == "part"
    assert found["ComfyUI"].dropped.keys() == tensors.keys() - lora.keys() == found["ComfyUI"].unmeant
    assert "2 words in one file as one" in found["ComfyUI"].reasons()[0]
    assert not any(one.faulty for one in found.values())


def test_forge_bears_twelve_keys_of_words(folders: dict[str, Path], adapters: ModuleType) -> None:
    base = bases.named(str(folders["sd1"]))
    lora, one = lora_of(base, adapters), word(base)
    for count, loads in ((12, "part"), (13, "nothing")):
        found = verdicts(embedding.bundle(lora, {f"w{i}": one for i in range(count)}), base)["Forge"]
        assert (found.loads, found.faulty) == (loads, False)


@pytest.mark.parametrize("tool", sorted(ALL - {"diffusers"}))
def test_a_fault_of_the_lora_is_one_in_a_bundle_too(
    tool: str, folders: dict[str, Path], adapters: ModuleType
) -> None:
    base = bases.named(str(folders["sd1"]))
    tensors = embedding.bundle(lora_of(base, adapters), {"toy": word(base)})
    found = verdicts(tensors | {"lora_unet_nowhere.alpha": torch.tensor(1.0)}, base)[tool]
    assert found.faulty and "lora_unet_nowhere.alpha" in found.dropped


def test_words_that_do_not_fit(folders: dict[str, Path], adapters: ModuleType) -> None:
    one, two = (bases.named(str(folders[name])) for name in ("sd1", "sdxl"))
    wide = verdicts(lora_of(one, adapters) | {"bundle_emb.toy.string_to_param.*": torch.ones(1, 33)}, one)
    for tool in MEANT:
        (why,) = wide[tool].dropped.values()
        assert wide[tool].faulty
        assert why == "the word toy: string_to_param.* is [1, 33], the text encoder is 32 wide"
    # A1111 makes no word of two tensors that are not the pair, and leaves out the whole file.
    strange = {f"bundle_emb.toy.{part}": torch.ones(1, 32) for part in ("clip_l", "t5")}
    found = verdicts(lora_of(one, adapters) | strange, one)
    assert found["A1111"].refused == "the word toy: found clip_l and t5, expected one tensor"
    assert found["ComfyUI"].faulty and found["ComfyUI"].dropped.keys() == strange.keys()
    half = verdicts(lora_of(two, adapters) | {"bundle_emb.toy.clip_l": torch.ones(1, 32)}, two)
    assert half["A1111"].refused is None and half["A1111"].faulty
    assert half["A1111"].dropped == {
        "bundle_emb.toy.clip_l": "the word toy: found clip_l, expected clip_l and clip_g"
    }


def test_verify_says_for_which_tools_a_bundle_is(
    sd1_folder: Path, adapters: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases.named(str(sd1_folder))
    tensors = embedding.bundle(lora_of(base, adapters), {"toy": word(base)})
    path = files.save(tmp_path / embedding.FOLDER / "case.safetensors", tensors, {})
    assert cli.main(["verify", str(path), "--base", str(sd1_folder)]) == 0
    out = capsys.readouterr().out
    *rules, last = out.splitlines()
    assert "by the tools' rules of naming alone: words lie in this LoRA's file (toy)" in last
    lines = {line.split()[1]: line for line in rules if line.startswith("case.safetensors: ")}
    assert lines.keys() == ALL
    for tool, line in lines.items():
        assert (f"loads all {len(tensors)} keys" in line) == (tool in MEANT), line
        assert (f"not meant for {tool}" in line) == (tool not in MEANT), line
    assert cli.main(["verify", str(path), "--base", str(sd1_folder), "--tool", "a1111"]) == 0
    for tool in ALL - MEANT:  # a tool that is asked for has to load all
        assert cli.main(["verify", str(path), "--base", str(sd1_folder), "--tool", tool]) == 2
    assert "would load nothing of it" in capsys.readouterr().err
