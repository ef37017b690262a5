"""`tuner prepare`: afterwards a run encodes nothing; it may be stopped and shared out, and lists the bad."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner.cli import main
from tuner.data.cache import Store
from tuner.family import Moments
from tuner.stable_diffusion import StableDiffusion

ROOT = Path(__file__).resolve().parents[2]
PICTURES, HELDOUT = 8, 2  # as many of the held-out ones as are looked at


@pytest.fixture
def prepare(tiny: Any, tmp_path: Path) -> Callable[..., int]:
    """`tuner prepare` of the tiny LoRA, in this process; the exit code."""

    def call(recipe: str = "lora.yaml", **more: Any) -> int:
        return main(
            ["prepare", str(ROOT / "recipes" / recipe), *tiny.overrides(recipe, tmp_path / "out", **more)]
        )

    return call


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries were written into a cache, shard by shard."""
    found: list[int] = []
    write = Store.write

    def counted(store: Store, entries: Any) -> None:
        found.append(len(entries))
        write(store, entries)

    monkeypatch.setattr(Store, "write", counted)
    return found


def entries(tmp_path: Path) -> tuple[int, int]:
    return tuple(len(Store(tmp_path / "out-cache" / name)) for name in ("latents", "text"))  # type: ignore[return-value]


def test_the_run_after_it_encodes_nothing(
    tiny: Any,
    prepare: Callable[..., int],
    written: list[int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prepare() == 0
    said = capsys.readouterr().out.splitlines()
    pictures, captions = entries(tmp_path)
    assert pictures == PICTURES + HELDOUT and captions >= HELDOUT and sum(written) == pictures + captions
    place = tmp_path / "out-cache"
    assert sum(line.startswith("pictures to encode: ") for line in said) == 2  # trained on, held out
    assert f"{PICTURES} samples trained on; {PICTURES} pictures encoded; " in "\n".join(said)
    assert f"{HELDOUT} samples held out; {HELDOUT} pictures encoded; " in "\n".join(said)
    assert said[-1] == f"prepared: {place}" and not (tmp_path / "out").exists()
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*.safetensors")}
    written.clear()
    assert prepare() == 0 and written == []
    assert tiny.start("lora.yaml", tmp_path / "out") == 0
    assert written == [] and "to encode" not in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*.safetensors")} == before


def test_stopped_it_keeps_what_it_has_and_goes_on(
    prepare: Callable[..., int],
    written: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tuner.data.encode.PIXELS_AT_ONCE", 3 * 64 * 64)
    images = StableDiffusion.encode_images
    seen: list[int] = []

    def pressed(family: StableDiffusion, pixels: torch.Tensor) -> Moments:
        seen.append(len(pixels))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return images(family, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_images", pressed)
    assert prepare() == 130
    assert written == [3] and entries(tmp_path) == (3, 0)
    assert "stopped; the same command goes on from there\n" in capsys.readouterr().out
    assert prepare() == 0
    assert sum(seen[2:]) == PICTURES - 3 + HELDOUT and entries(tmp_path)[0] == PICTURES + HELDOUT


def test_what_cannot_be_read_is_listed_and_counted(
    prepare: Callable[..., int], tiny: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether a source finds it (no such picture, a faulty line) or the decoder (a damaged one)."""
    source = tmp_path / "source"
    shutil.copytree(tiny.shapes / "style", source)
    listing = source / "metadata.jsonl"
    lines = listing.read_text().splitlines()
    pictures = sorted(source.rglob("*.png"))
    assert len(lines) == len(pictures) == PICTURES
    pictures[0].write_bytes(pictures[0].read_bytes()[:200])
    pictures[1].unlink()
    extra = source / "extra.png"
    shutil.copy(pictures[2], extra)
    listed = tmp_path / "out" / "unreadable.txt"
    for allowed in (0, 2):
        assert prepare(data__source=source, data__unreadable=allowed) == 2
        told = capfd.readouterr().err
        assert f"3 of {PICTURES + 1} samples cannot be used" in told and f"all of them: {listed}" in told
        assert len(listed.read_text().splitlines()) == 3
    listed.unlink()
    assert prepare(data__source=source, data__unreadable=3) == 0
    said = capfd.readouterr().out
    assert f"left out: 3 samples, listed in {listed}" in said
    found = listed.read_text().splitlines()
    for name, reason in (
        (pictures[0], "cannot be read"),
        (pictures[1], "no such picture"),
        (extra, "not listed in metadata.jsonl"),
    ):
        assert [line for line in found if name.name in line and reason in line], (name, found)
    assert f"{PICTURES - 2} samples trained on; {PICTURES - 2} pictures encoded" in said
    assert tiny.start("lora.yaml", tmp_path / "out", data__source=source, data__unreadable=3) == 0
    assert (tmp_path / "out" / "left_out.txt").read_text().splitlines() == found


def test_it_says_where_there_is_nothing_to_do(
    prepare: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert prepare(data__cache="off") == 2
    assert "data.cache: found off, so there is nothing to prepare" in capfd.readouterr().err
    assert prepare("embedded/1_autoencoder.yaml") == 2
    told = capfd.readouterr().err
    assert "nothing of this run may be cached (pictures: the method sees the pixels)" in told
    assert prepare(data__source="{path: 'shards/*.tar', streaming: true}") == 2
    assert (
        "nothing to prepare: shards/*.tar is read in passing, and encoded in each" in capfd.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@pytest.mark.slow
def test_two_processes_share_it(tiny: Any, tmp_path: Path) -> None:
    """With as many processes as the batch could not be divided by, which only a run has to."""
    words = tiny.overrides("lora.yaml", tmp_path / "out", train__batch_size=3)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        f"{free_port()}",
    ]
    command += ["-m", "tuner", "prepare", str(ROOT / "recipes/lora.yaml"), *words]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert entries(tmp_path)[0] == PICTURES + HELDOUT
    shards = list((tmp_path / "out-cache" / "latents").glob("*.safetensors"))
    assert len(shards) == 4, "two of each process"
    assert done.stdout.count("prepared: ") == 1
