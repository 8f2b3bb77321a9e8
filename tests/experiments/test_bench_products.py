"""The benchmark of products runs on small matrices, and refuses what cannot be."""

from __future__ import annotations

import json

import pytest

from experiments.bench import products
from speckv_online.cpu_engine.kernels.int8_blocks import lanes
from speckv_online.cpu_engine.kernels.team import TEAM


@pytest.mark.skipif(lanes() is None, reason="the CPU engine does not run here")
def test_seconds_of_every_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(products.SHAPES, "smollm2", ((64, 32, 2), (32, 64, 1)))
    monkeypatch.setattr(TEAM, "fixed", TEAM.fixed)
    asked = ["--rows", "1,5,9", "--turns", "1", "--threads", "1", "--levels", "fp16,q8_0,q4_1"]
    assert products.main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["level"], row["inputs"]) for row in found["rows"]] == [
        (level, inputs) for level in ("fp16", "q8_0", "q4_1") for inputs in (64, 32)
    ]
    assert all(0.0 < row["seconds"][rows] < 10.0 for row in found["rows"] for rows in ("1", "5", "9"))
    assert products.main(asked) == 0
    assert "q4_1 together" in capsys.readouterr().out


@pytest.mark.parametrize("asked", [["--rows", "0"], ["--rows", "x"], ["--levels", "q2_k"], ["--turns", "0"]])
def test_mistakes_are_one_line(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert products.main(asked) == 2
    assert capsys.readouterr().err.count("\n") == 1
