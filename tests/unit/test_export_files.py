from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest
import torch

from tuner.export import files

METADATA = {
    key: f'{key} "ü\n\t' for key in ("modelspec.title", "ss_v2", "tuner.recipe", "format", "zeta", "a")
}


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "wide": torch.randn(3, 5),
        "half": torch.randn(4, dtype=torch.float16),
        "brain": torch.randn(2, 2).bfloat16(),
        "whole": torch.arange(3),
        "alpha": torch.tensor(4.0),
        "across": torch.randn(3, 2).T,
    }


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = some_tensors()
    backwards = dict(reversed(tensors.items()))
    written = {files.save(tmp_path / "first", tensors, METADATA).read_bytes()}
    for number in range(8):  # the library's own order of metadata differs from save to save
        metadata = dict(reversed(METADATA.items())) if number % 2 else METADATA
        written.add(files.save(tmp_path / f"again{number}", backwards, metadata).read_bytes())
    assert len(written) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again" + str(n) for n in range(8)] + [
        "first"
    ]
    changed = dict(METADATA, a="other")
    assert files.save(tmp_path / "other", tensors, changed).read_bytes() not in written


def test_load_gives_back_what_was_saved(tmp_path: Path) -> None:
    tensors = some_tensors()
    loaded, metadata = files.load(files.save(tmp_path / "new" / "x.safetensors", tensors, METADATA))
    assert metadata == METADATA
    assert sorted(loaded) == sorted(tensors) and len(loaded) == 6
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    assert files.tensors_digest(loaded) == files.tensors_digest(tensors)
    assert files.load(files.save(tmp_path / "bare", tensors, {}))[1] == {}


def test_parameters_and_shared_memory_can_be_saved(tmp_path: Path) -> None:
    table = torch.nn.Parameter(torch.randn(6, 2))
    loaded, _ = files.load(files.save(tmp_path / "x", {"a": table, "b": table, "part": table[2:4]}, {}))
    assert torch.equal(loaded["a"], table) and torch.equal(loaded["b"], table)
    assert torch.equal(loaded["part"], table[2:4])


def test_data_digest_is_that_of_the_file_after_its_header(tmp_path: Path) -> None:
    content = files.save(tmp_path / "x", some_tensors(), METADATA).read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert files.data_digest(some_tensors()) == hashlib.sha256(content[8 + length :]).hexdigest()


def test_tensors_digest_sees_names_types_shapes_and_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.int32)
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.reshape(2, 3)},
        {"a": tensor.view(torch.float32)},
        {"a": tensor + 1},
        {"a": tensor[:3], "b": tensor[3:]},
        {"a": tensor[:2], "b": tensor[2:]},
    ]
    digests = [files.tensors_digest(variant) for variant in variants]
    assert len(set(digests)) == len(variants) == 7
    assert files.tensors_digest({"b": tensor[3:], "a": tensor[:3]}) == digests[5]


def test_a_failed_save_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = files.save(tmp_path / "x", {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def fail(path: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files, "_sort_header", fail)
    with pytest.raises(OSError, match="disk full"):
        files.save(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tensor"):
        files.save(tmp_path / "x", {}, {})


def test_write_whole_replaces_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "note.txt"
    assert files.write_whole(path, "ü\n") == path
    assert path.read_bytes() == b"\xc3\xbc\n"
    files.write_whole(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    expected = stat.S_IMODE(plain.stat().st_mode)
    saved = files.save(tmp_path / "saved", {"a": torch.ones(1)}, {})
    text = files.write_whole(tmp_path / "text", "x")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (saved, text)] == [expected, expected]


def test_folder_whole_replaces_an_older_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "diffusers"
    for content in ("first", "second"):
        with files.folder_whole(target) as folder:
            assert folder.parent == target.parent and list(folder.iterdir()) == []
            (folder / content).mkdir()
            (folder / content / "file").write_text(content)
        assert [path.name for path in target.iterdir()] == [content]
        assert (target / content / "file").read_text() == content
    assert list(target.parent.iterdir()) == [target]


def test_folder_whole_keeps_the_older_folder_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "diffusers"
    with files.folder_whole(target) as folder:
        (folder / "file").write_text("first")
    with pytest.raises(RuntimeError, match="stop"), files.folder_whole(target) as folder:
        (folder / "file").write_text("half")
        raise RuntimeError("stop")
    assert (target / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_whole_recovers_from_a_crash_between_its_two_renames(tmp_path: Path) -> None:
    target, aside = tmp_path / "diffusers", tmp_path / ".diffusers.old"
    aside.mkdir()
    (aside / "file").write_text("first")
    with pytest.raises(RuntimeError), files.folder_whole(target):
        assert (target / "file").read_text() == "first"
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [target]
