"""The documentation's example policies run, its tables name what there is; the benchmark prints what it says."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import policies as bench
from experiments.bench.simulator import made_up
from experiments.runtime.learner import own_state
from policies.base import Context, Decision, Outcome, PolicyError
from policies.registry import BUILTIN, make_policy
from speckv_online.cli.app import main
from speckv_online.simulate import Simulator, load_cost

DOCS = Path(__file__).parents[2] / "docs" / "policies.md"


@pytest.fixture
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the documentation's programs, each under the name in its first line."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    for name, code in blocks:
        (tmp_path / name).write_text(code, encoding="utf-8")
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_first_policy(examples: Path) -> None:
    spec = re.search(r"runs as\s`(twice:[^`]*)`", DOCS.read_text(encoding="utf-8"))
    assert spec is not None
    policy = make_policy(spec[1])
    assert policy.decide(Context()).gamma == 2
    assert policy.decide(Context(last_accepted=3)).gamma == 6


def test_complete_example_learns_and_stops_by_itself(examples: Path) -> None:
    simulator, plain = (
        Simulator(make_policy(spec), load_cost("rtx3090-release")) for spec in ("calibrated:Calibrated", "fixed:0")
    )
    replay = simulator.run(made_up())
    assert not simulator.policy.faults
    assert simulator.policy.info()["labelled"] == replay.tested.sum()
    assert replay.goodput > 1.2 * plain.run(made_up()).goodput
    assert len(np.unique(replay.proposed)) > 4  # not a fixed length
    assert (replay.drafted < replay.proposed).any()  # what submit withheld


def test_complete_example_saves_and_merges(examples: Path) -> None:
    traces, costs = made_up(8), load_cost("rtx3090-release")
    one, two, learner, again = (make_policy("calibrated:Calibrated") for _ in range(4))
    for policy, part in ((one, traces[:4]), (two, traces[4:])):
        Simulator(policy, costs).run(part)
    sums = one.state_dict()["calibrated.counts"] + two.state_dict()["calibrated.counts"]
    for policy in (one, two):
        learner.merge(policy.take_delta())
        assert not policy.take_delta()["calibrated.counts"].any()
    state = own_state(learner)
    assert (state["calibrated.counts"] == sums).all()
    again.load_state_dict(state)
    a, b = (Simulator(policy, costs).run(traces) for policy in (again, learner))
    assert (a.drafted == b.drafted).all()  # goes on as the saved one does, and writes to none of its arrays
    assert (state["calibrated.counts"] == sums).all()
    for stranger in ({}, make_policy("linucb").state_dict()):
        with pytest.raises(PolicyError, match="calibrated"):
            again.load_state_dict(stranger)


def test_complete_example_counts_an_outcome_once(examples: Path) -> None:
    policy = make_policy("calibrated:Calibrated")
    signals = np.tile([1.0, 0.75, 2.0, 0.0], (3, 1))
    decision = policy.decide(Context())
    for _ in range(2):
        policy.learn(decision, Outcome(drafted=3, accepted=1, tested=2, produced=2, signals=signals))
    assert policy.state_dict()["calibrated.counts"][:, 7].tolist() == [1.0, 2.0]


def test_complete_example_is_simulated_as_documented(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for trace in made_up(2):
        trace.save(examples / "traces" / "int8" / f"{trace.prompt_id}.npz")
    (line,) = re.findall(r"speckv simulate runs/profile (.*calibrated.*)", DOCS.read_text(encoding="utf-8"))
    assert main(["simulate", str(examples / "traces"), "--cost", "rtx3090-release", *line.split(), "--json"]) == 0
    assert "calibrated:Calibrated:0.1" in capsys.readouterr().out


def test_the_script_beside_the_complete_example_runs(examples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(examples / "try_calibrated.py"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["autoregressive", "fixed:4", "calibrated:Calibrated:0.1"]
    assert all(line.endswith(" {}") for line in printed)


def test_every_field_is_described() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for head, cls in (("Context: what", Context), ("Decision: what", Decision), ("Outcome: what", Outcome)):
        table = text.split(f"## {head}")[1].split("\n## ")[0]
        named = {
            n for row in table.splitlines() if row.startswith("|") for n in re.findall(r"`(\w+)`", row.split("|")[1])
        }
        assert named == {f.name for f in fields(cls)}


def test_every_policy_is_described() -> None:
    table = DOCS.read_text(encoding="utf-8").split("## What there is")[1].split("##")[0]
    named = {
        name.split(":")[0]
        for row in table.splitlines()
        for name in re.findall(r"`([^`]*)`", row.split("|")[1] if "|" in row else "")
    }
    assert named == set(BUILTIN)


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--steps", "200", "--policies", "fixed:2,svip,leviathan", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert list(rows) == [bench.REFERENCE, "fixed:2", "svip", "leviathan"]
    assert set(rows["fixed:2"]) == {"decide_p50", "decide_p99", "learn_p50", "learn_p99", "step_mean"}
    assert "proceed_p50" in rows["svip"]
    assert all(value > 0 for row in rows.values() for value in row.values())
    assert bench.main(["--steps", "200", "--policies", "fixed:2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4
    assert table[3].startswith("fixed:2 ")
