"""What is made of a file: it says so, it never takes another's place, and its numbers are rounded once."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tuner.errors import few
from tuner.export import adapter, files, kohya, metadata, peft_format
from tuner.export.kohya import LoraModule
from tuner.files import bases, merge

Run = Callable[..., tuple[int, str, str]]


def queries(base: Any, adapters: ModuleType, **more: Any) -> dict[str, LoraModule]:
    """A LoRA on the UNet's query projections."""
    made: dict[str, LoraModule] = adapters.loras(base, only=lambda p: p.endswith("attn1.to_q"), **more)
    assert len(made) > 4
    return made


@pytest.fixture
def mine(tmp_path: Path, sd1_folder: Path, adapters: ModuleType) -> Path:
    """A LoRA's file with metadata of a run."""
    tensors = kohya.to_kohya(queries(bases.named(str(sd1_folder)), adapters))
    told = {"modelspec.title": "mine", "tuner.recipe": "{}", "ss_network_module": "networks.lora"}
    return files.save(tmp_path / "mine.safetensors", tensors, metadata.derived(told, tensors, {}))


# --- Nothing is ever replaced.


def test_no_tool_writes_over_anything(run: Run, mine: Path, sd1_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    shutil.copy(mine, other)
    held = {path: path.read_bytes() for path in (mine, other)}
    pair = ("--lora", mine, "--lora", other)
    base = ("--base", sd1_folder)
    seen = 0
    for command in (
        ("convert", mine, "--to", "peft", *base),
        ("convert", mine, "--to", "kohya", *base),
        ("resize", mine, "--rank", 1, *base),
        ("merge", *pair, *base),
        ("merge", *pair, "--into", sd1_folder),
        ("extract", sd1_folder, sd1_folder, "--rank", 1),
    ):
        (tmp_path / "folder").mkdir(exist_ok=True)
        for out in (mine, other, tmp_path / "folder"):
            code, printed, err = run(*command, "--out", out)
            reads = mine in command and out == mine or command[0] == "merge" and out != tmp_path / "folder"
            wanted = "is what is read" if reads else "is there already"
            assert code == 2 and printed == "" and f"--out {out}: {wanted}" in err, command
            seen += 1
    assert seen == 18 and {path: path.read_bytes() for path in held} == held
    assert not list((tmp_path / "folder").iterdir())
    inside = sd1_folder / "merged"
    code, _, err = run("merge", *pair, "--into", sd1_folder, "--out", inside)
    assert code == 2 and f"lies within {sd1_folder}, which is read" in err and not inside.exists()


def test_a_control_nets_folder_is_not_written_over(
    run: Run, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    place = tmp_path / "net"
    models.family_of(sd1_folder, "controlnet").control_branch(3).save_pretrained(place)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    file, base = place / "diffusion_pytorch_model.safetensors", ("--base", sd1_folder)
    (tmp_path / "there").mkdir()
    for source, out, message in (
        (place, place, "is there already"),
        (file, place, "is there already"),
        (file, file, "is what is read"),
        (place, tmp_path / "there", "is there already"),
    ):
        code, _, err = run("convert", source, "--to", "diffusers", "--out", out, *base)
        assert code == 2 and f"--out {out}: {message}" in err
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before and len(before) == 2
    # a folder of one weights' file and its config.json is taken for that file
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    for source, out in ((place, one), (file, other)):
        assert run("convert", source, "--to", "cldm", "--out", out, *base)[0] == 0
    assert one.read_bytes() == other.read_bytes()
    code, told, _ = run("inspect", place, *base)
    assert code == 0 and "ControlNet (diffusers)" in told
    for command in (
        ("inspect", sd1_folder),
        ("convert", sd1_folder, "--to", "peft", "--out", tmp_path / "y"),
    ):
        code, _, err = run(*command)
        assert code == 2 and f"{sd1_folder}: is a folder; give the .safetensors in it" in err


# --- What a file says.


def test_what_is_made_of_a_file_says_so(run: Run, mine: Path, sd1_folder: Path, tmp_path: Path) -> None:
    small, middle, last = (tmp_path / f"{name}.safetensors" for name in ("small", "middle", "last"))
    base = ("--base", sd1_folder)
    assert run("resize", mine, "--rank", 1, "--out", small, *base)[0] == 0
    assert run("convert", small, "--to", "peft", "--out", middle, *base)[0] == 0
    assert run("convert", middle, "--to", "kohya", "--out", last, *base)[0] == 0
    derived = "resize rank 1 of mine"
    for path, more in (
        (small, ""),
        (middle, "convert to peft of small"),
        (last, "convert to kohya of middle (convert to peft of small"),
    ):
        derived_here = derived if not more else f"{more} ({derived}" + ")" * (1 + more.count("("))
        told = files.load(path)[1]
        assert told["modelspec.title"] == path.stem and told["tuner.derived"] == derived_here
        assert told["tuner.recipe"] == "{}" and told["ss_network_module"] == "networks.lora"
        assert told["modelspec.hash_sha256"] == f"0x{files.data_digest(files.load(path)[0])}"
    assert run("resize", mine, "--energy", 0.5, "--out", tmp_path / "e.safetensors", *base)[0] == 0
    assert files.load(tmp_path / "e.safetensors")[1]["tuner.derived"] == "resize energy 0.5 of mine"
    pair = ("--lora", mine, "--lora", f"{small}:-0.5")
    assert run("merge", *pair, "--out", tmp_path / "sum.safetensors", *base)[0] == 0
    told = files.load(tmp_path / "sum.safetensors")[1]
    assert told["tuner.derived"] == "merge of 1 x mine + -0.5 x small" and told["modelspec.title"] == "sum"


def test_whole_differences_are_told_as_the_runs_own(
    run: Run, sd1_folder: Path, tmp_path: Path, models: ModuleType
) -> None:
    family = models.family_of(sd1_folder, "lora")
    method = models.move(models.method_of("lora", family, kind="dora", text_encoder=False))
    own = tmp_path / "own"
    told = {"ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "8.0"}
    card = models.card_of(torch.float32, method)
    card = type(card)(card.name, card.dtype, {"lora": {"format": "pt", **told}})
    method.export(family, own, card)
    out = tmp_path / "baked.safetensors"
    source = own / "peft" / "pytorch_lora_weights.safetensors"
    assert run("convert", source, "--to", "kohya", "--out", out, "--base", sd1_folder)[0] == 0
    keys = ("ss_network_module", "ss_network_args", "ss_network_dim", "ss_network_alpha")
    wanted, found = (files.load(path)[1] for path in (own / "case.safetensors", out))
    assert {key: wanted.get(key) for key in keys} == {key: found.get(key) for key in keys}
    assert found["ss_network_module"] == "lycoris.kohya" and json.loads(found["ss_network_args"]) == {
        "algo": "full"
    }


def test_the_network_of_a_file_that_tells_none(
    run: Run, sd1_folder: Path, tmp_path: Path, adapters: ModuleType
) -> None:
    base = bases.named(str(sd1_folder))
    tensors, told = peft_format.to_peft(queries(base, adapters))
    path = files.save(tmp_path / "p.safetensors", tensors, told)
    out = tmp_path / "k.safetensors"
    assert run("convert", path, "--to", "kohya", "--out", out, "--base", sd1_folder)[0] == 0
    assert files.load(out)[1]["ss_network_module"] == "networks.lora"
    args = json.dumps({"algo": "locon", "dropout": "0"})
    kept = {"ss_network_module": "lycoris.kohya", "ss_network_args": args}
    files.save(path, *(kohya.to_kohya(queries(base, adapters)), kept))
    last = tmp_path / "l.safetensors"
    assert run("convert", path, "--to", "comfy", "--out", last, "--base", sd1_folder)[0] == 0
    assert kept.items() <= files.load(last)[1].items()


@pytest.mark.parametrize(
    ("name", "version"), [("sd1", "sd_v1"), ("sd2", "sd_v2_v"), ("sdxl", "sdxl_base_v1-0")]
)
@pytest.mark.parametrize("part", ["", "unet"])
def test_what_is_extracted_says_what_the_base_predicts(
    name: str, part: str, version: str, run: Run, folders: dict[str, Path], tmp_path: Path
) -> None:
    tuned, out = tmp_path / "tuned", tmp_path / "x.safetensors"
    shutil.copytree(folders[name], tuned)
    (path,) = bases.weights_files(tuned / "unet")
    tensors, told = files.load(path)
    key = "mid_block.resnets.0.conv1.weight"
    files.save(path, tensors | {key: tensors[key] + torch.ones_like(tensors[key])}, told)
    base = folders[name]
    assert run("extract", base / part, tuned / part, "--rank", 1, "--out", out)[0] == 0
    told = files.load(out)[1]
    assert told["ss_base_model_version"] == version
    assert told["modelspec.prediction_type"] == ("v" if name == "sd2" else "epsilon")
    assert told["modelspec.title"] == "x" and told["ss_network_module"] == "networks.lora"
    names = f"{part} - {part}" if part else f"tuned - {base.name}"
    assert told["tuner.derived"] == f"extract rank 1 of {names}"


# --- Numbers.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_of_any_kind_are_rounded_once(
    dtype: torch.dtype, run: Run, sd1_folder: Path, tmp_path: Path, adapters: ModuleType
) -> None:
    """Ranks 1, 2 and 3 with alpha 1: scales 1, 1/2 and 1/3, which kohya's names hold multiplied into `up`.

    The product is computed in float32 and rounded once, so that an entry errs by half a unit in the last
    place of its type, and by as much of float32's: of float16 2^-11 of itself (2^-25 where it is subnormal).
    Scales that are powers of two leave every bit.
    """
    base = bases.named(str(sd1_folder))
    paths = list(queries(base, adapters))
    modules = {}
    for number, path in enumerate(paths):
        rank = number % 3 + 1
        made = adapters.loras(base, rank, 1 / rank, only=path.__eq__, seed=number)[path]
        modules[path] = LoraModule(made.down.to(dtype), made.up.to(dtype), 1 / rank)
    tensors, told = peft_format.to_peft(modules)
    first = files.save(tmp_path / "first.safetensors", tensors, told)
    baked, back, again = (tmp_path / f"{name}.safetensors" for name in ("baked", "back", "again"))
    for source, to, out in ((first, "kohya", baked), (baked, "peft", back), (back, "kohya", again)):
        assert run("convert", source, "--to", to, "--out", out, "--base", sd1_folder)[0] == 0
    found = adapter.read(*files.load(back), base).loras("this")
    info = torch.finfo(dtype)
    exact, rounded = 0, 0
    for path, own in modules.items():
        rank = own.down.shape[0]
        assert found[path].down.shape[0] == 3 and found[path].scale == 1.0
        assert torch.equal(found[path].down[:rank], own.down) and not found[path].down[rank:].any()
        up, wanted = found[path].up[:, :rank].double(), own.up.double() / rank
        assert not found[path].up[:, rank:].any()
        if rank < 3:
            assert torch.equal(up, wanted)
            exact += 1
        else:
            half = info.eps / 2 + 2.0**-23  # of the type, and of the product in float32
            bound = half * wanted.abs() + info.smallest_normal * info.eps / 2
            assert bool(((up - wanted).abs() <= bound).all()) and not torch.equal(up, wanted)
            rounded += 1
    assert exact > 3 and rounded > 1
    assert files.data_digest(files.load(again)[0]) == files.data_digest(files.load(baked)[0])


def test_a_rank_that_is_more_than_there_is(
    run: Run, mine: Path, sd1_folder: Path, tmp_path: Path, adapters: ModuleType
) -> None:
    out = tmp_path / "x.safetensors"
    code, lines, _ = run("resize", mine, "--rank", 64, "--out", out, "--base", sd1_folder)
    count = len(queries(bases.named(str(sd1_folder)), adapters))
    assert (
        code == 0 and f"--rank 64 is more than there is: {count} of {count} modules have 2 or less" in lines
    )
    assert files.load(out)[1]["ss_network_dim"] == "2"


@pytest.mark.parametrize(
    ("text", "why"), [("0", "it has no effect"), ("-0.0", "no effect"), ("nan", "finite")]
)
def test_a_weight_without_effect_is_refused(
    text: str, why: str, run: Run, mine: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"weight {text}: .*{why}"):
        merge.parse(f"a.safetensors:{text}")
    lora = ("--lora", f"{mine}:{text}", "--prompt", "a", "--out", tmp_path / "x")
    code, _, err = run("sample", "--base", "embedded", *lora)
    assert code == 2 and why in err


def test_five_names_at_most() -> None:
    names = [f"lora_{letter}.yaml" for letter in "abcdefgh"] + ["zebra"]
    assert few("x", names[:3]) == "lora_a.yaml, lora_b.yaml, lora_c.yaml"
    told = few("lora_g.yml", names)
    assert told.startswith("lora_g.yaml, ") and told.endswith(" and 4 more") and "zebra" not in told
    assert len(re.findall(r"lora_\w", told)) == 5


# --- Messages.


def test_a_lora_where_word_vectors_are_wanted_is_told_in_a_line(
    run: Run, sd1_folder: Path, tmp_path: Path, adapters: ModuleType, models: ModuleType
) -> None:
    base = bases.named(str(sd1_folder))
    tensors = kohya.to_kohya(adapters.loras(base))
    lora = files.save(tmp_path / "lora.safetensors", tensors, {})
    more = f"and {len(tensors) - 5} more ({len(tensors)} tensors); expected one tensor, the vectors of a word"
    arguments = ("--base", sd1_folder, "--prompt", "a lora", "--size", "64x64", "--out", tmp_path / "x")
    code, _, err = run("sample", *arguments, "--embedding", lora)
    line = err.strip().splitlines()[-1]
    assert code == 2 and len(tensors) > 100 and line.endswith(more) and line.count("lora_unet") == 0
    assert line.count(".alpha") + line.count("lora_down") + line.count("lora_up") == 5
    with pytest.raises(ValueError, match=re.escape(more)):
        models.method_of("textual_inversion", models.family_of(sd1_folder, "lora"), init=str(lora))


def test_the_hint_is_of_what_can_be_done_there(
    run: Run, folders: dict[str, Path], tmp_path: Path, adapters: ModuleType, models: ModuleType
) -> None:
    base = bases.named(str(folders["sdxl"]))
    lora = files.save(
        tmp_path / "x.safetensors", kohya.to_kohya(adapters.loras(base), kohya.naming("sdxl", base.unet)), {}
    )
    here = ("--base", folders["sd1"])
    drawing = ("--prompt", "a", "--size", "64x64", "--lora", lora, "--out", tmp_path / "y")
    code, _, err = run("sample", *here, *drawing)
    assert code == 2 and "was it made for another base?" in err and "--base FOLDER" not in err
    code, _, err = run("merge", "--lora", lora, "--into", folders["sd1"], "--out", tmp_path / "z")
    assert code == 2 and "was it made for another base?" in err and "--base FOLDER" not in err
    with pytest.raises(ValueError, match=r"method\.lora\.start: .*was it made for another base\?$"):
        family = models.family_of(folders["sd1"], "lora")
        models.method_of("lora", family, start=str(lora))
    for command in (("convert", lora, "--to", "peft"), ("resize", lora, "--rank", 1)):
        code, _, err = run(*command, *here, "--out", tmp_path / "w.safetensors")
        assert code == 2 and err.strip().endswith("if it was made for another base, say so: --base FOLDER")


def test_a_missing_recipe_and_folder_name_the_nearest(run: Run, tmp_path: Path) -> None:
    from tuner.data.sources import folder, spec

    for number in range(20):
        (tmp_path / f"lora_{number}.yaml").touch()
        (tmp_path / f"pictures_{number}").mkdir()
    code, _, err = run("train", tmp_path / "unlike")
    assert code == 2 and len(re.findall(r"lora_\d", err)) == 5 and "and 15 more" in err
    with pytest.raises(ValueError) as caught:
        folder.open_folder(spec.SourceSpec(path=str(tmp_path / "pictures")), lambda _: None, 0)
    told = str(caught.value)
    assert len(re.findall(r"pictures_\d+", told)) == 5 and told.endswith("and 15 more")
