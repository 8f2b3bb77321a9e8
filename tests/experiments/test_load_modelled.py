"""Serving in the simulator, as a command: what it prints, beside a measurement too, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.load.modelled import main
from speckv_online.simulate.engine_costs import EngineCosts
from tests.support.replays import made


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    EngineCosts("made", tuple(0.01 + 0.001 * n for n in range(1, 100)), each_round=0.002).save(
        tmp_path / "draft_model-bfloat16.json"
    )
    for i, accepted in enumerate(([3, 2, 1, 0, 2, 1, 0, 0], [0, 0, 1, 0, 0, 0], [5, 4, 3, 2, 1, 0, 0])):
        made(accepted, level="bfloat16").save(tmp_path / "draft_model-bfloat16" / f"{i}.npz")
    return tmp_path


def test_contenders_at_loads(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--calibrated", str(calibrated), "--requests", "20", "--concurrency", "1,4", "--replicas", "1,2"]
    assert main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * 2 * 5
    assert {row["kind"] for row in rows} == {"modelled"}
    for row in rows:
        assert row["throughput"] > 0
        if row["contender"] == "none":
            assert row["over_none"] == 1.0
    assert main(arguments) == 0
    assert "4 at a time" in capsys.readouterr().out


def test_beside_a_measurement(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"loop": "closed", "load": 2.0, "contender": name, "output_throughput": 50.0} for name in ("none", "1")]
    told = {"summaries": [{"method": "draft_model", "dtype": "bfloat16", "rows": rows}]}
    (calibrated / "load.json").write_text(json.dumps(told))
    arguments = ["--calibrated", str(calibrated), "--requests", "20", "--measured", str(calibrated / "load.json")]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["load"] for row in found} == {2.0}
    beside = {row["contender"]: row.get("predicted_over_measured") for row in found}
    assert beside["none"] == pytest.approx(next(r["throughput"] for r in found if r["contender"] == "none") / 50.0)
    assert beside["1"] is not None
    assert beside["online"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibrated", "/nowhere"], "cannot read an engine's costs"),
        (["--method", "other"], "--method takes"),
        (["--concurrency", "0"], "whole numbers from 1"),
        (["--measured", "/nowhere"], "cannot read"),
    ],
)
def test_mistakes_are_one_line(
    calibrated: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = ["--calibrated", str(calibrated), *arguments]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
