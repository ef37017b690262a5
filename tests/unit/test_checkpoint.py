"""Checkpoints: whole or not at all, exact, the newest that is whole."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner import checkpoint
from tuner.checkpoint import Parts
from tuner.disk import DiskError
from tuner.ema import Ema
from tuner.errors import UserError
from tuner.training import Checkpoint

ACCELERATOR: Any = SimpleNamespace(is_main_process=True, num_processes=1)
FINGERPRINT = {
    "recipe": {"train.seed": 0, "objective.betas": (0.9, 0.999)},
    "precision": "fp32",
    "threads": 1,
    "made with": {"code": "abc", "torch": "2"},
}
RECIPE = {"train": {"seed": 0, "resume": "auto"}, "output": "x"}


class Small(torch.nn.Module):
    """Stands in for a task: four trained numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"0.weight": self.weight}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        assert tensors.keys() == {"0.weight"}
        with torch.no_grad():
            self.weight.copy_(tensors["0.weight"])


def parts(ema: bool = True) -> Parts:
    task: Any = Small()
    optimiser = torch.optim.AdamW(task.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    return Parts(task, optimiser, schedule, Ema([("0.weight", task.weight)], 0.5) if ema else None, None)


def step(made: Parts, number: int) -> None:
    weight: Any = made.task.weight
    made.optimiser.zero_grad()
    ((weight - number) ** 2).sum().backward()
    made.optimiser.step()
    made.schedule.step()
    if made.ema is not None:
        made.ema.update(number)


def write(output: Path, number: int, made: Parts, keep: int = 2, **asked: Any) -> None:
    train = SimpleNamespace(checkpoint=Checkpoint(keep=keep, **asked))
    recipe: Any = SimpleNamespace(train=train, resolved=lambda: RECIPE)
    checkpoint.write(output, number, made, FINGERPRINT, recipe, ACCELERATOR)


def names(output: Path) -> list[str]:
    return sorted(p.name for p in (output / "checkpoints").iterdir())


def test_a_continued_run_is_the_uninterrupted_one_bitwise(tmp_path: Path) -> None:
    whole = parts()
    for number in range(1, 7):
        step(whole, number)
        if number == 3:
            write(tmp_path, 3, whole)
    state = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 3
    later = parts()
    assert checkpoint.restore(state, later) == 3
    for number in range(4, 7):
        step(later, number)
    assert torch.equal(whole.task.weight, later.task.weight)  # type: ignore[arg-type]
    assert whole.schedule.get_last_lr() == later.schedule.get_last_lr()
    assert whole.ema is not None and later.ema is not None
    whole.ema.keep()
    later.ema.keep()
    assert torch.equal(whole.task.weight, later.task.weight)  # type: ignore[arg-type]
    assert not torch.equal(whole.task.weight, torch.arange(4.0))  # type: ignore[arg-type]


def test_nothing_to_continue(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    made = parts()
    for number in (5, 10, 15):
        write(tmp_path, number, made)
    assert names(tmp_path) == ["step-0000010", "step-0000015"]
    write(tmp_path, 20, made, keep=1)
    assert names(tmp_path) == ["step-0000020"]
    write(tmp_path, 20, made, keep=1)  # the same step again replaces it
    assert names(tmp_path) == ["step-0000020"]


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    made = parts()
    for number in (0, 5, 10, 15, 20, 25):
        write(tmp_path, number, made, keep=1, keep_every=10)
    assert names(tmp_path) == ["step-0000010", "step-0000020", "step-0000025"]


def test_young_ones_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = parts()
    for number, hour in ((5, 0.0), (10, 1.0), (15, 2.5), (20, 3.0)):
        monkeypatch.setattr(checkpoint.time, "time", lambda hour=hour: 1e9 + 3600 * hour)
        write(tmp_path, number, made, keep=1, keep_hours=2.25)
    assert names(tmp_path) == ["step-0000010", "step-0000015", "step-0000020"]
    for folder in (tmp_path / "checkpoints").iterdir():  # as after a copy: files' times say nothing
        os.utime(folder / "manifest.json", (0, 0))
    write(tmp_path, 25, made, keep=1, keep_hours=1.25)
    assert names(tmp_path) == ["step-0000015", "step-0000020", "step-0000025"]


def test_one_in_the_place_of_another_is_never_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the guard writes the checkpoint that it goes back to once more, killed between the two renames.
    write(tmp_path, 5, parts())
    before = (tmp_path / "checkpoints/step-0000005/manifest.json").read_bytes()
    rename, renamed = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        renamed.append(self.name)
        if self.name.endswith(".writing"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        write(tmp_path, 5, parts(ema=False))
    assert renamed == ["step-0000005", ".step-0000005.writing"]
    state = checkpoint.newest(tmp_path)
    assert state is not None and (state.folder / "manifest.json").read_bytes() == before
    write(tmp_path, 5, parts(ema=False))
    assert names(tmp_path) == ["step-0000005"]
    assert (tmp_path / "checkpoints/step-0000005/manifest.json").read_bytes() != before


def test_a_checkpoint_ahead_never_crowds_out_a_new_one(tmp_path: Path) -> None:
    made = parts()
    for number in (5, 10, 15):
        write(tmp_path, number, made, keep=3)
    checkpoint.drop_ahead(tmp_path, 5)
    write(tmp_path, 7, made, keep=2)
    assert names(tmp_path) == ["step-0000005", "step-0000007"]
    checkpoint.drop_ahead(tmp_path, 0)
    assert names(tmp_path) == []


FILES = ["manifest.json", "state.pt", "trained.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_one_wrong_byte_is_found_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    made = parts()
    write(tmp_path, 5, made)
    write(tmp_path, 10, made)
    newest = tmp_path / "checkpoints" / "step-0000010"
    assert sorted(p.name for p in newest.iterdir()) == FILES
    content = bytearray((newest / file).read_bytes())
    content[0 if file == "manifest.json" else len(content) // 2] ^= 0x01
    (newest / file).write_bytes(content)
    state = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 5
    said = capsys.readouterr().out
    assert str(newest) in said and "step-0000005: this one, before it, is used" in said
    assert ("not a whole checkpoint" if file == "manifest.json" else f"damaged ({file})") in said


@pytest.mark.parametrize("file", FILES)
def test_a_torn_folder_is_passed_over(tmp_path: Path, file: str) -> None:
    made = parts()
    write(tmp_path, 5, made)
    write(tmp_path, 10, made)
    (tmp_path / "checkpoints" / "step-0000010" / file).unlink()
    (tmp_path / "checkpoints" / ".step-0000020.writing").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    state = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 5
    checkpoint.drop_ahead(tmp_path, state.step)
    write(tmp_path, 12, made)
    assert names(tmp_path) == ["step-0000005", "step-0000012", "step-notes"]


def test_all_damaged_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 5, parts())
    (tmp_path / "checkpoints" / "step-0000005" / "state.pt").write_bytes(b"")
    assert checkpoint.newest(tmp_path) is None
    said = capsys.readouterr().out
    assert "step-0000005: damaged (state.pt)" in said and "is used" not in said


def test_differences_are_named(tmp_path: Path) -> None:
    write(tmp_path, 5, parts())
    state = checkpoint.newest(tmp_path)
    assert state is not None
    # A pair becomes a list in JSON; that is no difference.
    assert checkpoint.differences(state, FINGERPRINT) == []
    found = checkpoint.differences(state, {"recipe": FINGERPRINT["recipe"], "base files": "a"})
    assert found == [
        "base files: the checkpoint has None, the run 'a'",
        "precision: the checkpoint has 'fp32', the run None",
    ]
    # What leaves the training the same but for its rounding is told by resume.promise.
    assert checkpoint.differences(state, {**FINGERPRINT, "threads": 8, "made with": {"code": "d"}}) == []
    other = {**FINGERPRINT, "recipe": {**FINGERPRINT["recipe"], "train.seed": 1}}  # type: ignore[dict-item]
    assert checkpoint.differences(state, other) == ["train.seed: the checkpoint has 0, the run 1"]


@pytest.mark.parametrize("before, text", [(True, "made with ema"), (False, "made without ema")])
def test_another_kind_of_state_is_refused(tmp_path: Path, before: bool, text: str) -> None:
    write(tmp_path, 5, parts(ema=before))
    state = checkpoint.newest(tmp_path)
    assert state is not None
    with pytest.raises(UserError, match=text):
        checkpoint.restore(state, parts(ema=not before))


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    write(tmp_path, 5, parts())
    folder = tmp_path / "checkpoints" / "step-0000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["state.pt", "trained.safetensors"]
    assert manifest["step"] == 5 and manifest["recipe"] == RECIPE
    assert manifest["fingerprint"]["made with"] == {"code": "abc", "torch": "2"}
    state = checkpoint.at(folder)
    assert state is not None and state.recipe == RECIPE


CHANGES = [
    ('"step": 5', '"step": 6'),
    ('"train.seed": 0', '"train.seed": 1'),
    ('"digest"', '"digesu"'),
    ('"output": "x"', '"output": "y"'),
]


@pytest.mark.parametrize("old, new", CHANGES)
def test_a_changed_manifest_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    write(tmp_path, 5, parts())
    place = tmp_path / "checkpoints" / "step-0000005" / "manifest.json"
    text = place.read_text()
    assert text.count(old) == 1
    place.write_text(text.replace(old, new))
    assert checkpoint.newest(tmp_path) is None
    assert "not a whole checkpoint (manifest.json was changed)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"files": []}', '{"files": {}, "fingerprint": {}, "step": 1}', "\x00"]
)
def test_no_manifest_at_all(tmp_path: Path, text: str) -> None:
    write(tmp_path, 5, parts())
    (tmp_path / "checkpoints" / "step-0000005" / "manifest.json").write_text(text)
    assert checkpoint.newest(tmp_path) is None


class Planted:
    """What would run code where a pickle is trusted."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    write(tmp_path, 5, parts())
    state = checkpoint.newest(tmp_path)
    assert state is not None
    planted = pickle.dumps({"optimiser": Planted(tmp_path / "run")}, protocol=2)
    pickle.loads(planted)
    (tmp_path / "run").rmdir()  # it works where it is trusted
    with zipfile.ZipFile(state.folder / "state.pt", "w") as archive:
        archive.writestr("state/data.pkl", planted)
        archive.writestr("state/version", "3\n")
        archive.writestr("state/byteorder", "little")
    made = parts()
    with pytest.raises(UserError, match="state.pt: no state of a run"):
        checkpoint.restore(state, made)
    assert not (tmp_path / "run").exists()
    (state.folder / "state.pt").write_bytes(planted)
    with pytest.raises(UserError, match="state.pt: no state of a run"):
        checkpoint.restore(state, made)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["save_file", "torch.save", "os.fsync", "shutil.rmtree"])
def test_a_failing_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    made = parts()
    write(tmp_path, 5, made)
    before = (tmp_path / "checkpoints/step-0000005/manifest.json").read_bytes()

    def fail(*_: object, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(number, os.strerror(number))

    where = {"save_file": checkpoint, "torch.save": torch, "os.fsync": os, "shutil.rmtree": checkpoint.shutil}
    real = checkpoint.shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(DiskError) as caught:
        patch.setattr(where[call], call.split(".")[-1], fail)
        write(tmp_path, 10, made, keep=1)
    assert str(caught.value).endswith(f": cannot be written: {os.strerror(number)}")
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert (tmp_path / "checkpoints/step-0000005/manifest.json").read_bytes() == before
    # Where only taking the old one away failed, the new one is whole.
    assert checkpoint.steps(tmp_path) == ([5, 10] if call == "shutil.rmtree" else [5])
    assert checkpoint.shutil.rmtree is real
    if call != "shutil.rmtree":
        assert names(tmp_path) == ["step-0000005"]


def test_every_process_hears_of_a_failing_disk(tmp_path: Path) -> None:
    told: list[int] = []

    def reduce(mine: torch.Tensor, how: str) -> torch.Tensor:
        told.append(int(mine))
        return mine + 1

    recipe: Any = SimpleNamespace(train=SimpleNamespace(checkpoint=Checkpoint()), resolved=lambda: RECIPE)
    other: Any = SimpleNamespace(
        is_main_process=False, num_processes=2, device=torch.device("cpu"), reduce=reduce
    )
    with pytest.raises(UserError, match="the main process could not write the checkpoint"):
        checkpoint.write(tmp_path, 5, parts(), FINGERPRINT, recipe, other)
    assert told == [0] and not (tmp_path / "checkpoints").exists()
