"""Replays of several drafters of one pair, against the best fixed gamma of each and of all."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.replays import drafters as replays_drafters
from speckv_online.simulate.cost_table import CostTable, LevelCost, load_cost
from speckv_online.simulate.replay_scores import ReplayEvaluation
from speckv_online.traces.trace import load_traces
from tests.support.random_traces import random_traces, save

COST = CostTable("test", {"nf4": LevelCost(0.01, (0.05, 0.056), 0.001)})


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Two drafters with the same outputs: one that asks a model, and one that gives the same tokens for nothing."""
    traces = random_traces(6, ease=1.5)
    free = [replace(t, lookups=np.full_like(t.signals[..., 0], 0.5), meta={"drafter": "ngram"}) for t in traces]
    folders = {"own/model": save(traces, tmp_path / "model"), "own/free": save(free, tmp_path / "free")}
    named = ",".join(f"{name}={folder}" for name, folder in folders.items())
    cost = COST.save(tmp_path / "cost.json")
    return ["--traces", named, "--costs", str(cost), "--orders", "1", "--out", str(tmp_path / "out")]


def test_both_rivals_are_those_of_hindsight(flags: list[str], tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    document.write_text("Words.\n<!-- drafters: begin -->\nold\n<!-- drafters: end -->\n")
    more = ["--policies", "fixed:2,autoregressive", "--doc", str(document)]
    assert replays_drafters.main([*flags, *more]) == 0
    text = document.read_text()
    cost = load_cost(str(tmp_path / "cost.json"))
    contests = [ReplayEvaluation(load_traces(tmp_path / name), cost) for name in ("model", "free")]
    model, free = (evaluation.best.goodput for evaluation in contests)
    assert free > model
    row = next(line for line in text.splitlines() if line.startswith("| `autoregressive`"))
    plain = contests[0].plain.goodput
    wanted = [f"{plain / own:.3f} ({plain / own:.3f}) | {plain / free:.3f}" for own in (model, free)]
    assert row == f"| `autoregressive` | {' | '.join(wanted)} |"
    two = [evaluation.fixed(2).goodput for evaluation in contests]
    cell = next(line for line in text.splitlines() if line.startswith("| own, `test`, nf4"))
    assert f"| {two[0]:.2f} ({two[0] / model:.3f}) |" in cell
    assert re.search(rf"\| {two[1]:.2f} .* \| {two[1] / free:.3f} \[", cell)
    assert "for `fixed:2` with each drafter" in text
    assert "\nold\n" not in text


def test_mistakes_are_one_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replays_drafters.main(["--traces", "own=here"]) == 2
    assert "PAIR/DRAFTER=DIRECTORY" in capsys.readouterr().err
    other = save(random_traces(5), tmp_path / "other")
    named = f"{flags[1].partition(',')[0]},own/other={other}"
    assert replays_drafters.main([flags[0], named, *flags[2:], "--policies", "fixed:2"]) == 2
    assert "hold other outputs at nf4" in capsys.readouterr().err.splitlines()[-1]
