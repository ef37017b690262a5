"""The C library's allocator, told to keep what is freed."""

from __future__ import annotations

import pytest

from tuner import allocator


def test_the_allocator_is_left_alone_where_the_environment_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: None) -> None:
            pass

        @staticmethod
        def mallopt(key: int, value: int) -> int:
            asked.append((key, value))
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    assert allocator.keep_freed() and asked == list(allocator.KEPT.items())
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.setenv(name, "1")
        assert not allocator.keep_freed()
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())  # no glibc
    assert not allocator.keep_freed()
    assert len(asked) == len(allocator.KEPT)
