"""Contests of policies on traces, threshold rules tuned in hindsight, and ``speckv simulate``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.base import MAX_GAMMA
from policies.baselines.engines.llamacpp import LlamaCpp
from policies.baselines.svip import Svip
from speckv_online.cli.app import main
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.replay_scores import ReplayEvaluation, play, prepared
from speckv_online.simulate.simulator import Simulator, replay_plan
from speckv_online.simulate.threshold_oracles import ask_per_token, tuned
from speckv_online.traces.trace import Trace
from tests.support.random_traces import random_trace, random_traces, save

LEVEL = LevelCost(0.01, (0.05, 0.056), 0.001, 1e-4, 30, catch_up_seconds=1e-3, first_draft_seconds=0.002)
COST = CostTable("test", {"nf4": LEVEL, "int8": LEVEL})


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    return random_traces(6)


@pytest.mark.parametrize("finish", ["length", "eos"])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_threshold_rules_are_replayed_as_the_policies_would_be(threshold: float, finish: str) -> None:
    for seed in range(3):
        trace = random_trace(seed, finish=finish)
        below = trace.signals[:, :, 1].astype(float) < threshold
        withheld = ask_per_token(below), ask_per_token(below) - below.any(axis=1)
        limit = threshold**2 / (0.15 * np.log(2))
        entropy = ask_per_token(trace.signals[:, :, 0].astype(float) > limit)
        rule = LlamaCpp(p_min=threshold, n_max=MAX_GAMMA)
        cases = [(rule, withheld), (Svip(threshold=threshold), (entropy, entropy))]
        for policy, plan in cases:
            want = Simulator(policy, COST).replay(trace)
            got = replay_plan(trace, *plan, COST.level("nf4"))
            for name in ("position", "drafted", "accepted", "labelled", "produced", "proposed", "seconds"):
                np.testing.assert_allclose(getattr(got, name), getattr(want, name), err_msg=name)


def test_tuned_rules_are_the_best_of_their_kind(traces: list[Trace]) -> None:
    found = {rule.kind: rule for rule in tuned(traces, COST)}
    assert set(found) == {"confidence", "llamacpp", "svip", "adaedl"}
    for threshold in (0.2, 0.5, 0.8):
        rule = LlamaCpp(p_min=threshold, n_max=MAX_GAMMA)
        assert Simulator(rule, COST).run(traces).goodput <= found["llamacpp"].goodput + 1e-12
        assert Simulator(Svip(threshold=threshold), COST).run(traces).goodput <= found["svip"].goodput + 1e-12
    setting = float(found["svip"].setting)
    assert Simulator(Svip(threshold=setting), COST).run(traces).goodput == pytest.approx(found["svip"].goodput)


def test_hindsight_ranks_as_it_must(traces: list[Trace]) -> None:
    evaluation = ReplayEvaluation(traces, COST)
    best, oracle = evaluation.best, evaluation.task_oracle
    for gamma in range(MAX_GAMMA + 1):
        assert evaluation.fixed(gamma).goodput <= best.goodput * (1 + 1e-12)
    assert best.goodput <= oracle.goodput * (1 + 1e-12) <= evaluation.clairvoyant.goodput * (1 + 1e-9)
    assert evaluation.clairvoyant.goodput <= evaluation.dynamic_programming_bound.goodput * (1 + 1e-12)
    assert evaluation.thresholds[0].goodput <= evaluation.clairvoyant.goodput
    assert evaluation.clairvoyant.tokens.tolist() == [len(t) for t in traces]
    assert best.over(best).value == 1
    with pytest.raises(UserError, match="one level"):
        ReplayEvaluation(random_traces(2, ("nf4", "int8")), COST)


def test_learning_policies_meet_the_prompts_in_seeded_orders(traces: list[Trace]) -> None:
    score = play("lints", traces, COST, range(3))
    again = play("lints", traces, COST, range(3))
    assert score.learns
    assert not score.faults
    assert score.orders.tolist() == again.orders.tolist()
    assert len(set(score.orders.tolist())) == 3
    assert score.tokens.tolist() == [len(t) for t in traces]
    # Goodput of the mean over orders lies among the orders'.
    assert min(score.orders) <= score.goodput <= max(score.orders)


def test_a_policy_is_told_the_costs(traces: list[Trace]) -> None:
    assert {t.level for t in traces} == {"nf4"}
    policy = prepared("leviathan", COST, ["nf4"], 0)
    assert policy.costs.level("nf4").draft == pytest.approx(0.01)


def test_what_is_no_contest_is_refused_at_once(traces: list[Trace]) -> None:
    nf4 = [t for t in traces if t.level == "nf4"]
    with pytest.raises(UserError, match="no level 'nf4'; it has int8: give --levels"):
        ReplayEvaluation(nf4, CostTable("test", {"int8": LEVEL}))
    with pytest.raises(UserError, match="has no level 'nf4'; it has none at all"):
        ReplayEvaluation(nf4, CostTable("test", {}))
    with pytest.raises(UserError, match="traces of a prompt more than once at nf4"):
        ReplayEvaluation([*nf4, nf4[0]], COST)
    other = replace(nf4[0], meta={"draft_fingerprint": "another"})
    with pytest.raises(UserError, match="traces of 2 drafts at nf4"):
        ReplayEvaluation([*nf4[1:], other], COST)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(random_traces(3, ("nf4", "int8")), tmp_path / "traces")
    COST.save(folder / "cost.json")
    common = ["simulate", str(folder), "--policies", "fixed:0,fixed:2,lints:alpha=0.2,discount=0.99", "--seeds", "2"]
    assert main([*common, "--json", "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] == "modelled"
    assert found == json.loads((tmp_path / "out" / "simulate.json").read_text())
    rows = {(row["level"], row["policy"]): row for row in found["rows"]}
    assert {level for level, _ in rows} == {"nf4", "int8"}
    assert rows["nf4", "fixed:0"]["over_plain"]["value"] == pytest.approx(1)
    assert rows["nf4", "fixed:2"]["over_best_fixed"]["value"] <= 1
    assert rows["nf4", "best fixed gamma"]["kind"] == "hindsight"
    assert ("nf4", "lints:alpha=0.2,discount=0.99") in rows
    assert main([*common, "--levels", "nf4", "--cost", "rtx3090-release"]) == 0
    text = capsys.readouterr().out
    assert "modelled: 3 traces" in text
    assert "int8" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cost", "rtx3090-release", "--policies", "fixd:4"], "did you mean fixed"),
        ([], "give --cost rtx3090-release"),
        (["--cost", "rtx3090-release", "--seeds", "0"], "--seeds must be at least 1"),
        (["--cost", "rtx3090-release", "--levels", "fp16"], "no traces of fp16"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    folder = save(random_traces(1), tmp_path)
    assert main(["simulate", str(folder), "--policies", "fixed:4", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
