"""Mapped tensors come back bit by bit; a file that is damaged, foreign or too large is as if it were not there."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch

from speckv_online.io.mapped_tensors import MappedFiles, joined

TENSORS = {
    "a/half": torch.randn(4, 16).half(),
    "b": torch.randn(4, 16).half(),
    "empty": torch.empty(0),
    "number": torch.tensor(7, dtype=torch.uint8),
    "long": torch.arange(5),
    "brain": torch.randn(3, 1, 2).bfloat16(),
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MappedFiles:
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path))
    return MappedFiles("some", 3_000_000)


def test_what_was_kept_comes_back(files: MappedFiles) -> None:
    assert files.get("a") is None
    assert files.put("a", {"is": ["this"]}, TENSORS)
    facts, found = files.get("a") or (None, {})
    assert facts == {"is": ["this"]}
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert found["a/half"].data_ptr() % 64 == 0
    assert found["a/half"].data_ptr() + found["a/half"].nbytes == found["b"].data_ptr()
    assert (files.folder / "a").stat().st_mode & 0o777 == 0o600


def test_what_is_written_into_a_tensor_stays_in_the_process(files: MappedFiles) -> None:
    files.put("a", None, TENSORS)
    before = (files.folder / "a").read_bytes()
    _, found = files.get("a") or (None, {})
    found["b"].zero_()
    assert not found["b"].any()
    assert (files.folder / "a").read_bytes() == before
    _, again = files.get("a") or (None, {})
    assert torch.equal(again["b"], TENSORS["b"])


@pytest.mark.parametrize("change", ["head", "tensor", "hash", "short", "empty", "foreign"])
def test_a_damaged_file_is_set_aside(files: MappedFiles, change: str, caplog: pytest.LogCaptureFixture) -> None:
    files.put("a", None, TENSORS)
    path = files.folder / "a"
    data = bytearray(path.read_bytes())
    at = {"head": 20, "tensor": data.index(TENSORS["b"].numpy().tobytes()), "hash": len(data) - 1}.get(change)
    if at is not None:
        data[at] ^= 1
    path.write_bytes({"short": data[:-40], "empty": b"", "foreign": b"something else" * 50}.get(change, bytes(data)))
    with caplog.at_level(logging.WARNING):
        assert files.get("a") is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "set aside" in caplog.text
    assert not path.exists()
    assert (files.folder / "damaged").exists()
    assert files.put("a", None, TENSORS)
    assert files.get("a") is not None


def test_a_file_that_others_may_write_is_not_read(files: MappedFiles) -> None:
    files.put("a", None, TENSORS)
    (files.folder / "a").chmod(0o622)
    assert files.get("a") is None


def test_the_folder_stays_within_its_size(files: MappedFiles) -> None:
    for i in range(4):
        assert files.put(str(i), None, {"t": torch.zeros(900_000, dtype=torch.uint8)})
        os.utime(files.folder / str(i), (i, i))
    assert sum(f.stat().st_size for f in files.folder.iterdir()) <= 3_000_000
    assert files.get("0") is None
    assert files.get("3") is not None
    assert not files.put("large", None, {"t": torch.zeros(3_000_000, dtype=torch.uint8)})
    assert files.get("3") is not None


def test_no_cache_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPECKV_CACHE", str(tmp_path / "file"))
    files = MappedFiles("some", 3_000_000)
    with files.lock():
        assert not files.put("a", None, TENSORS)
    assert files.get("a") is None


def test_neighbours_are_joined_without_a_copy(files: MappedFiles) -> None:
    files.put("a", None, TENSORS)
    _, found = files.get("a") or (None, {})
    whole = joined([found["a/half"], found["b"]])
    assert whole.data_ptr() == found["a/half"].data_ptr()
    assert torch.equal(whole, torch.cat((TENSORS["a/half"], TENSORS["b"])))
    for others in ([found["b"], found["a/half"]], [found["b"], TENSORS["b"]], [TENSORS["empty"], TENSORS["empty"]]):
        assert torch.equal(joined(others), torch.cat(others))
        assert joined(others).data_ptr() not in [t.data_ptr() for t in others if t.numel()]
