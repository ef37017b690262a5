"""A cache whose entries are named by what they depend on, and whose files are whole or not there."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tuner.data import cache
from tuner.data.cache import Hashes, Store, key
from tuner.data.loader import Latents
from tuner.errors import UserError


def test_golden_key() -> None:
    """If this fails, what names stand for has changed: raise cache.VERSION and put the new values here."""
    assert cache.VERSION == 2
    assert key(caption="ein Käfer", dtype="float32") == "748c75b4b9063be61ca3e4dceb9298a9f88d313e"
    assert key(dtype="float32", caption="ein Käfer") == key(caption="ein Käfer", dtype="float32")


def test_the_version_is_part_of_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(a=1)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert key(a=1) != before


def test_hashes_are_made_again_when_size_time_or_file_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = cache.content_hash
    monkeypatch.setattr(cache, "content_hash", lambda path: (read.append(path.name), whole(path))[1])
    file = tmp_path / "a"
    file.write_bytes(b"one")
    stamp = file.stat().st_mtime_ns

    def made() -> tuple[str, int]:
        read.clear()
        return Hashes(tmp_path / "cache").of([file])[file], len(read)

    first, reads = made()
    assert reads == 1 and len(first) == 64
    assert made() == (first, 0)
    file.write_bytes(b"longer")  # another size, the same time
    os.utime(file, ns=(stamp, stamp))
    second, reads = made()
    assert reads == 1 and second != first
    os.utime(file, ns=(stamp + 10**9, stamp + 10**9))  # another time
    assert made() == (second, 1)
    (tmp_path / "b").write_bytes(b"writer")  # another file of that name, size and time
    os.utime(tmp_path / "b", ns=(stamp + 10**9, stamp + 10**9))
    (tmp_path / "b").replace(file)
    third, reads = made()
    assert reads == 1 and third not in {first, second}
    assert made() == (third, 0)


def test_a_store_keeps_tensors_bitwise_and_sees_what_others_wrote(tmp_path: Path) -> None:
    one, other = Store(tmp_path), Store(tmp_path)
    entries = {name: torch.randn(2, 3) for name in "abc"}
    one.write(entries)
    assert all(name in one for name in entries) and "a" not in other
    other.refresh()
    for store in (one, other, Store(tmp_path)):
        assert [torch.equal(store.read(name), tensor) for name, tensor in entries.items()] == [True] * 3
    assert len(one) == 3 and one.has(np.array(["a", "d", "c"], cache.NAME)).tolist() == [True, False, True]
    (shard,) = tmp_path.iterdir()
    assert shard.suffix == ".safetensors"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(shard.stat().st_mode) == 0o666 & ~mask  # a cache may be shared
    assert {name: tensor.tolist() for name, tensor in load_file(shard).items()} == {
        name: tensor.tolist() for name, tensor in entries.items()
    }


@pytest.mark.parametrize("dtype", list(cache.TYPES.values()), ids=str)
def test_every_type_and_shape_is_read_as_written(tmp_path: Path, dtype: torch.dtype) -> None:
    entries = {"none": torch.ones(()), "some": torch.randn(3, 1, 5), "much": torch.randn(700)}
    entries = {name: tensor.to(dtype) for name, tensor in entries.items()}
    Store(tmp_path).write(entries)
    found = pickle.loads(pickle.dumps(Store(tmp_path)))
    for name, tensor in entries.items():
        read = found.read(name)
        assert read.dtype == dtype and read.shape == tensor.shape and torch.equal(read, tensor)


def test_very_many_shards_are_read_with_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "OPEN", 3)
    store = Store(tmp_path)
    for number in range(8):
        store.write({f"{number}": torch.full((2,), float(number))})
    for number in (*range(8), *range(8)[::-1], 3, 4, 3):
        assert store.read(f"{number}").tolist() == [number, number]
        assert len(store._open) <= 3
    assert len(store) == len(Store(tmp_path)) == 8


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_is_ever_read(at: int, bit: int) -> None:
    """Wherever a bit of a shard is another: what is read is what was written, or an error."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        entries = {key(number=number): torch.arange(4.0) + number for number in range(3)}
        Store(folder).write(entries)
        (shard,) = folder.iterdir()
        content = bytearray(shard.read_bytes())
        content[at % len(content)] ^= 1 << bit
        shard.write_bytes(content)
        store = Store(folder)
        if not shard.exists():
            assert len(store) == 0
            return
        wrong = 0
        for name, tensor in entries.items():
            if name not in store:  # a bit of the name
                wrong += 1
                continue
            try:
                assert torch.equal(store.read(name), tensor)
            except UserError as error:
                wrong += 1
                assert str(shard) in str(error)
        spaces = int.from_bytes(content[:8], "little") + 8 > at % len(content) and wrong == 0
        assert wrong == 1 or spaces or (wrong and "checks" not in str(content))


def test_a_shard_that_is_taken_away_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    Store(tmp_path).write({"a": torch.ones(2)})
    store = Store(tmp_path)
    (shard,) = tmp_path.iterdir()
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file.*no more; give the same command again"):
        store.read("a")
    assert len(Store(tmp_path)) == 0


def forking(script: str) -> subprocess.Popen[bytes]:
    """A script in a process of its own, whose children need not import everything again."""
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_what_a_killed_process_leaves_is_not_used_and_goes_when_it_is_old(tmp_path: Path) -> None:
    """A process is killed again and again while it writes shards; what is there is whole."""
    killer = f"""
import os, sys, time, torch
from pathlib import Path
from tuner.data.cache import Store
for turn in range(8):
    if (child := os.fork()) == 0:
        store, number = Store(Path({str(tmp_path)!r})), turn * 10**6
        while True:
            store.write({{f"{{number + i}}": torch.full((50_000,), float(number + i)) for i in range(8)}})
            number += 8
    time.sleep(0.05 + 0.013 * turn)
    os.kill(child, 9)
    os.waitpid(child, 0)
    print("killed", flush=True)
    sys.stdin.readline()
"""
    seen = left = 0
    with forking(killer) as process:
        assert process.stdout is not None and process.stdin is not None
        for _ in range(8):
            assert process.stdout.readline() == b"killed\n"
            left += len(list(tmp_path.glob("*.writing")))
            store = Store(tmp_path)
            assert len(store) % 8 == 0 and len(store) >= seen
            seen = len(store)
            process.stdin.write(b"\n")
            process.stdin.flush()
    names = [int(name) for shard in tmp_path.glob("*.safetensors") for name in load_file(shard)]
    assert len(names) == seen > 0
    for name in names:
        assert torch.equal(store.read(f"{name}"), torch.full((50_000,), float(name)))
    (tmp_path / "mine.writing").write_bytes(b"x")
    (tmp_path / "old.writing").write_bytes(b"x")
    for file in tmp_path.glob("*.writing"):
        if file.name != "mine.writing":
            os.utime(file, (1e9, 1e9))
    Store(tmp_path)
    assert [file.name for file in tmp_path.glob("*.writing")] == ["mine.writing"]


def test_two_processes_write_into_one_folder_at_a_time(tmp_path: Path) -> None:
    writers = f"""
import os, torch
from pathlib import Path
from tuner.data.cache import Store
child = os.fork()
name, store = "a" if child else "b", Store(Path({str(tmp_path)!r}))
for i in range(20):
    store.write({{f"{{name}} {{i}}": torch.full((9,), float(i)), f"both {{i}}": torch.ones(i + 1)}})
store.refresh()
assert all(f"{{name}} {{i}}" in store for i in range(20))
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    with forking(writers) as process:
        assert process.wait(60) == 0
    store = Store(tmp_path)
    assert len(store) == 60 and len(list(tmp_path.iterdir())) == 40
    for i in range(20):
        assert store.read(f"a {i}").tolist() == store.read(f"b {i}").tolist() == [i] * 9
        assert store.read(f"both {i}").tolist() == [1.0] * (i + 1)


def test_names_of_many_are_the_names_of_each() -> None:
    about = {"height": 3, "flip": False, "background": "(255, 255, 255)"}
    digests = [f"{number:064x}" for number in range(5)]
    assert list(cache.keys("picture", digests, **about)) == [key(picture=d, **about) for d in digests]
    latents = Latents(4, 8, None, digests, (("vae", "x"), ("alpha", "mask")))
    names = [latents.name(n, (64, 32), True) for n in (3, 1)]
    assert latents.names((3, 1), (64, 32), True) == names and len(set(names)) == 2


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_torn_shard_is_taken_away(tmp_path: Path, share: float) -> None:
    Store(tmp_path).write({"kept": torch.ones(2)})
    (kept,) = tmp_path.iterdir()
    Store(tmp_path).write({"torn": torch.ones(100)})
    (torn,) = set(tmp_path.iterdir()) - {kept}
    content = torn.read_bytes()
    torn.write_bytes(content[: int(len(content) * share)])
    store = Store(tmp_path)
    assert "torn" not in store and "kept" in store
    assert list(tmp_path.iterdir()) == [kept]
    store.write({"torn": torch.ones(100)})
    assert torch.equal(Store(tmp_path).read("torn"), torch.ones(100))
