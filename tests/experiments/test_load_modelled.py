"""Serving in the simulator, as a command: what it prints, beside a measurement too, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.load import changes
from experiments.load.config import LoadConfig
from experiments.load.modelled import main
from experiments.load.predicted import predict
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


def test_a_policy_is_soon_back_after_a_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of one task are easy, those of the other are hard; drafts pay for one, not for the other."""
    EngineCosts("made", tuple(0.02 + 0.001 * n for n in range(1, 400)), each_round=0.005).save(
        tmp_path / "draft_model-bfloat16.json"
    )
    rng = np.random.default_rng(0)
    for task, chance in (("code", 0.8), ("chat", 0.2)):
        for i in range(8):
            hits = np.minimum(rng.geometric(1 - chance, 60) - 1, np.arange(60, 0, -1)).clip(0, 16)
            trace = replace(made(hits.tolist(), level="bfloat16"), task=task)
            trace.save(tmp_path / "draft_model-bfloat16" / f"{task}-{i}.npz")
    arguments = ["--calibrated", str(tmp_path), "--steps", "300", "--seeds", "2"]
    assert changes.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * (len(changes.PHASES) - 1)
    assert max(row["steps"] for row in rows) <= 200
    assert changes.main([*arguments, "--tasks", "code,other"]) == 2
    assert "no text of the task 'other'" in capsys.readouterr().err


def test_steps_until_the_rate_is_back() -> None:
    settled = [(0.1 * step, 2 * step) for step in range(1, 400)]
    assert changes.back(settled, settled) == 0
    slow = [(0.2 * step, 2 * step) for step in range(1, 131)]
    late = slow + [(26.0 + 0.1 * step, 260 + 2 * step) for step in range(1, 200)]
    assert changes.back(late, settled) == 140
    assert changes.back([(0.2 * step, 2 * step) for step in range(1, 400)], settled) is None


def test_predictions_stand_beside(calibrated: Path) -> None:
    config = LoadConfig(methods=("draft_model",), concurrency=("2",), repeats=2, warm=True, calibrated=str(calibrated))
    assert config.all_contenders() == ["none", "1", "2", "4", "table", "online", "warm online"]
    rows = [
        {"loop": loop, "load": 2.0, "contender": name}
        for loop in ("closed", "open")
        for name in config.all_contenders()
    ]
    summary = {"method": "draft_model", "dtype": "bfloat16", "table": [[1, 2, 2]], "rows": rows}
    predict(config, summary)
    found = {(row["loop"], row["contender"]): row["predicted"] for row in rows}
    assert min(found.values()) > 0
    assert found["closed", "table"] == found["closed", "2"]
    assert found["closed", "none"] != found["closed", "1"]


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
