"""Small files in the user's cache: what is damaged, foreign or too much is as if it were not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from speckv_online.io.user_cache import SmallFiles, key_of


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallFiles:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    return SmallFiles("some", 1000)


def test_what_was_kept_comes_back(files: SmallFiles) -> None:
    assert files.get("a") is None
    files.put("a", b"one")
    files.put("a", b"other")
    files.put("b", b"")
    assert files.get("a") == b"other"
    assert files.get("b") == b""
    assert (files.folder / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", [0, 5, 31, 33, 40])
def test_a_damaged_file_is_as_if_it_were_not_there(files: SmallFiles, cut: int) -> None:
    files.put("a", b"0123456789")
    path = files.folder / "a"
    path.write_bytes(path.read_bytes()[:cut])
    assert files.get("a") is None
    files.put("a", b"again")
    assert files.get("a") == b"again"


def test_a_file_that_others_may_write_is_not_read(files: SmallFiles) -> None:
    files.put("a", b"code")
    (files.folder / "a").chmod(0o622)
    assert files.get("a") is None


def test_the_folder_stays_within_its_size(files: SmallFiles) -> None:
    for i in range(12):
        files.put(f"{i}", bytes(168))
        os.utime(files.folder / f"{i}", (i, i))
    files.put("last", bytes(168))
    assert sum(f.stat().st_size for f in files.folder.iterdir()) <= 1000
    assert files.get("last") is not None
    assert files.get("0") is None


def test_no_cache_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "file"))
    files = SmallFiles("some", 1000)
    files.put("a", b"one")
    assert files.get("a") is None


def test_keys_tell_parts_apart() -> None:
    assert len({key_of("ab", "c"), key_of("a", "bc"), key_of("abc"), key_of("abc", "")}) == 4
