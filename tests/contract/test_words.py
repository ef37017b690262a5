"""New words, alone and with a LoRA: nothing else moves, on every family, and a run continues bitwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from tuner import base, build, checkpoint, device, loop, recipe, sample
from tuner.checkpoint import State
from tuner.data.cache import Hashes
from tuner.data.samples import Sample
from tuner.log import Log, read
from tuner.signals import Stop

WORDS = """
  textual_inversion:
    norm: {norm}
    learning_rate: 0.02
    tokens:
      - {{token: <new>, init: red, vectors: 2, replace: toy}}
      - {{token: <by>, init: random, replace: in}}
"""
LORA = "  lora: {rank: 2, text_encoder: true}\n"
RECIPE = """
base: {base}
method:{method}
data:
  source: {data}
  resolution: 32
  cache: {cache}
  captions: {{templates: ["a photo of {{}}", "{{}}"]}}
train:
  steps: 4
  batch_size: 4
  learning_rate: 0.01
  optimiser: {{name: adamw, weight_decay: 0.5}}
  precision: {precision}
  threads: 1
  checkpoint: {{every: 2}}
log: {{tensorboard: false}}
output: {output}
"""
Start = Callable[..., loop.Run]


@pytest.fixture
def start(folders: dict[str, Path], samples: list[Sample], tmp_path: Path) -> Iterator[Start]:
    """Builds a run on a tiny base and trains it, from a checkpoint if one is given."""
    for one in samples:
        one.picture.path.with_suffix(".txt").write_text(one.captions[0])

    def trained(
        name: str, output: str, method: str, precision: str = "fp32", state: State | None = None
    ) -> loop.Run:
        AcceleratorState._reset_state(True)
        place = tmp_path / f"{output}.yaml"
        more = {"base": folders[name], "data": samples[0].picture.path.parent, "output": tmp_path / output}
        more |= {"cache": tmp_path / "cache", "precision": precision, "method": method}
        place.write_text(RECIPE.format(**more))
        about = recipe.load(place)
        run = build.build(about, device.start(precision, 1))
        with Log(run.output, False, None, True, None, {}) as log, Stop() as stop:
            assert loop.train(run, log, state, stop)
        return run

    yield trained
    AcceleratorState._reset_state(True)


def is_as_it_was(run: loop.Run, folder: Path, hashes: Path, dtype: torch.dtype) -> int:
    """Every tensor of the base is bitwise the file's, in the precision it is held in; how many there are."""
    fresh = base.load(str(folder), None, (), ("unet", "vae", "text_encoder"), 0, Hashes(hashes))
    trained, count = {id(parameter) for parameter in run.task.trained()}, 0
    for component, module in fresh.modules().items():
        now = run.family.modules()[component].state_dict(keep_vars=True)
        now = {n.replace(".base_layer.", "."): t for n, t in now.items() if id(t) not in trained}
        assert now.keys() == module.state_dict().keys()
        for name, tensor in module.state_dict().items():
            held = dtype if component != "vae" and tensor.is_floating_point() else tensor.dtype
            assert now[name].dtype == held and torch.equal(now[name], tensor.to(held)), name
            count += 1
    return count


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("norm", ["free", "kept"])
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_in_bf16_with_weight_decay_only_new_rows_move_and_a_run_continues_bitwise(
    name: str, norm: str, start: Start, folders: dict[str, Path], tmp_path: Path
) -> None:
    method = WORDS.format(norm=norm)
    whole = start(name, "whole", method, "bf16")
    encoders = {"sdxl": 2}.get(name, 1)
    rows = whole.task.tensors()
    assert len(rows) == encoders and {tuple(t.shape)[0] for t in rows.values()} == {3}
    assert {tensor.dtype for tensor in rows.values()} == {torch.float32}
    assert is_as_it_was(whole, folders[name], tmp_path, torch.bfloat16) > 200
    (words,) = whole.methods
    for encoder in words.encoders:
        before, after = words.start(encoder), words.table(encoder).detach()
        assert bool((before != after).any(dim=1).all())
        kept = torch.allclose(before.norm(dim=1), after.norm(dim=1), rtol=1e-6, atol=0)
        assert kept == (norm == "kept")
    halfway = checkpoint.at(whole.output / "checkpoints" / "step-0000002")
    assert halfway is not None
    again = start(name, "again", method, "bf16", halfway)
    assert same(rows, again.task.tensors())
    scalars = [read(run.output / "metrics.jsonl").scalars for run in (whole, again)]
    for key in ("loss", "row_norm", "row_drift"):
        assert scalars[0][key][2:] == scalars[1][key] and len(scalars[1][key]) == 2
    assert scalars[0]["row_drift"][0][1] > 0.01


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_pivotal_tuning_trains_both_and_off_is_the_base(
    name: str, start: Start, folders: dict[str, Path], tmp_path: Path
) -> None:
    words = WORDS.format(norm="free")
    method = f"{words}{LORA}"
    whole = start(name, "whole", method)
    kinds = {method.kind: method for method in whole.methods}
    assert kinds.keys() == {"lora", "textual_inversion"}
    groups = [group for method in whole.methods for group in method.groups(0.01)]
    assert {group["lr"] for group in groups} == {0.01, 0.02}
    assert is_as_it_was(whole, folders[name], tmp_path, torch.float32) > 200
    tensors = whole.task.tensors()
    ups = {key: t for key, t in tensors.items() if "lora_B" in key}
    assert {key.split(".")[1] for key in ups} >= {"unet", "text_encoder"}
    assert len(ups) > 20 and all(bool(t.any()) for t in ups.values())
    rows = kinds["textual_inversion"]
    assert all(not torch.equal(rows.start(e), rows.table(e)) for e in rows.encoders)
    halfway = checkpoint.at(whole.output / "checkpoints" / "step-0000002")
    assert halfway is not None
    assert same(tensors, start(name, "again", method, state=halfway).task.tensors())

    sampler = sample.Sampler(whole.task, whole.accelerator, 32, steps=2)
    prompts = ["a <new> here", "a toy <by> it", "red"]
    adapted, bare = sampler.pictures(prompts), sampler.pictures(prompts, adapted=False)
    fresh = start(name, "fresh", words)
    with torch.no_grad():
        for encoder, table in fresh.methods[0].rows.items():
            table.copy_(rows.start(encoder))
    expected = sample.Sampler(fresh.task, fresh.accelerator, 32, steps=2).pictures(prompts)
    for one, other, changed in zip(bare, expected, adapted, strict=True):
        assert (one == other).all() and (one != changed).any()
