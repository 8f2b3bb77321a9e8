"""The command that leaves a level out of what a policy learns from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import unseen_level
from experiments.unseen_level import experienced
from policies.base import Context
from speckv_online.simulate.cost_table import CostTable, LevelCost
from tests.support.made_traces import made_trace

COST = CostTable("test", {level: LevelCost(0.01, (0.05, 0.056), 0.001) for level in ("fp16", "int8", "nf4")})


def test_it_has_met_the_other_levels_only() -> None:
    source = [made_trace(p, level) for p in range(4) for level in ("fp16", "nf4")]
    policy = experienced("linucb:safety=off", COST, ["int8"], 0, source=source)
    fresh = experienced("linucb:safety=off", COST, ["int8"], 0, source=source[:1])
    assert policy.costs.level("fp16").steps > 0 < policy.costs.level("nf4").steps
    assert not policy.costs.level("int8").steps
    assert policy.costs.level("int8").draft == pytest.approx(0.01)  # known from the calibration
    assert policy.features(Context(level="int8"))[8] == 0.5
    assert (policy.W != fresh.W).any()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, prompts in (("train", range(3)), ("test", range(3, 6))):
        for p in prompts:
            for level in ("fp16", "nf4"):
                path = tmp_path / folder / level
                path.mkdir(parents=True, exist_ok=True)
                made_trace(p, level).save(path / f"{p}.npz")
    COST.save(tmp_path / "cost.json")
    flags = ["--train", str(tmp_path / "train"), "--test", str(tmp_path / "test"), "--orders", "2"]
    flags += ["--cost", str(tmp_path / "cost.json"), "--policies", "linucb", "--out", str(tmp_path / "out")]
    assert unseen_level.main(flags) == 0
    text = capsys.readouterr().out
    assert text.startswith("modelled")
    document = json.loads((tmp_path / "out" / "unseen-level.json").read_text())
    assert [row["level"] for row in document["rows"]] == ["fp16", "nf4"]
    for row in document["rows"]:
        assert row["low"] <= row["value"] <= row["high"]
        assert row["value"] == pytest.approx(row["described"] / row["code"])
        assert f"{row['described']:.2f}" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policies", "fixed:4"], "option levels"),
        (["--policies", "online:levels=code"], "option levels"),
        (["--orders", "0"], "--orders"),
        (["--train", "nowhere"], "no trace"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unseen_level.main([*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_prompts_that_were_learned_from_are_not_scored_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for level in ("fp16", "nf4"):
        (tmp_path / level).mkdir()
        made_trace(0, level).save(tmp_path / level / "0.npz")
    COST.save(tmp_path / "cost.json")
    flags = ["--train", str(tmp_path), "--test", str(tmp_path), "--cost", str(tmp_path / "cost.json")]
    assert unseen_level.main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert "1 prompts are in --train and in --test" in capsys.readouterr().err
