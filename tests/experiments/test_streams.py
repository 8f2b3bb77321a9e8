"""Streams of traces: walking step by step, merging exactly, changes, and the commands that report on them."""

from __future__ import annotations

import itertools
import json
import re
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.replays import __main__ as replays
from experiments.streams import __main__ as replays_streams
from experiments.streams.drift import Drift, as_rows, drift
from experiments.streams.merge import cold, exchange, simulate
from experiments.streams.walker import Walker, again, change, endless, relative, settle
from policies.base import Decision, Outcome, Policy
from policies.guards.fault import Wrapper
from policies.learned.linear import LinUcb
from policies.registry import make_policy
from speckv_online.simulate.cost_table import CostTable, LevelCost
from speckv_online.simulate.replay_scores import tell_costs
from speckv_online.simulate.simulator import Simulator
from tests.support.random_traces import random_trace, random_traces, save

COST = CostTable("test", {level: LevelCost(0.01, (0.05, 0.056), 0.001) for level in ("nf4", "int8")})
TRACES = random_traces(8)


def test_a_walker_takes_the_simulator_s_steps() -> None:
    stream = list(itertools.islice(endless(TRACES, 3), 12))
    policy = make_policy("lints", seed=1)
    tell_costs(policy, COST, COST.levels)
    replay = Simulator(policy, COST).run(stream)
    walker = Walker(make_policy("lints", seed=1), iter(stream), COST)
    parts = [walker.advance(n) for n in (1, 7, 50, len(replay) - 58)]
    assert sum(tokens for tokens, _ in parts) == replay.tokens
    assert sum(seconds for _, seconds in parts) == pytest.approx(replay.seconds.sum())


class Taped(Wrapper):
    """Remembers what it learnt from."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.tape: list[tuple[Decision, Outcome]] = []

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.tape.append((decision, outcome))
        self.policy.learn(decision, outcome)


@pytest.mark.parametrize(("every", "rounds"), [(1, 20), (40, 2)])
@pytest.mark.parametrize("spec", ["lints:safety=off", "linucb:discount=0.99,safety=off", "linucb:safety=off"])
def test_eight_workers_know_what_one_knows_on_the_same_data(spec: str, every: int, rounds: int) -> None:
    learner, one = make_policy(spec), make_policy(spec)
    walkers = [Walker(Taped(make_policy(spec, worker=i)), endless(TRACES, i), COST) for i in range(8)]
    for policy in (learner, one):
        tell_costs(policy, COST, COST.levels)
    for _ in range(rounds):
        for walker in walkers:
            walker.advance(every)
        exchange(learner, walkers, deque(), 0)
        # One worker that meets what all of them have met, a batch at a time.
        for walker in walkers:
            tape = walker.policy.tape
            for decision, outcome in tape:
                one.learn(decision, outcome)
            tape.clear()
    ours, theirs = learner.state_dict(), one.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.endswith(".misc") and key.startswith("cost."):
            continue  # how far times may stray before they are clipped: each copy's own, and no statistic
        np.testing.assert_allclose(ours[key], value, rtol=1e-9, atol=1e-9, err_msg=key)
    for walker in walkers:
        for key, value in walker.policy.state_dict().items():
            np.testing.assert_array_equal(value, ours[key], err_msg=key)


def test_merging_is_the_same_stream_with_other_knowledge() -> None:
    two = {"workers": 2, "steps": 60}
    alone = simulate("linucb", TRACES, COST, every=1000, **two)
    assert alone == simulate("linucb", TRACES, COST, every=60, **two)
    assert alone != simulate("linucb", TRACES, COST, every=5, **two)


def test_a_stream_changes_when_the_period_is_over() -> None:
    kinds = {"chat": TRACES[::2], "code": TRACES[1::2]}
    met = change(make_policy("fixed:2"), kinds, COST, 60, 2, 0)
    assert [v.kind for v in met] == ["chat", "code", "chat", "code", "chat"]
    for v in met:
        assert v.steps.sum() >= 60 > v.steps[:-1].sum()
        assert {t.task for t in v.traces} == {v.kind}
        # A settled fixed gamma is itself.
        settled = settle(make_policy("fixed:2"), kinds[v.kind], COST, 60, 0)
        np.testing.assert_allclose(again(settled, v.traces, COST), v.seconds)


def test_seconds_are_summed_by_the_steps_before_them() -> None:
    steps, final = np.full(10, 50), np.ones(10)
    slow = np.array([2.0, 2.0, 2.0, 1.3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    own, same = relative(steps, slow, final, np.array([0, 200, 400, np.inf]))
    np.testing.assert_allclose(own, [7.3, 4.0, 2.0])
    np.testing.assert_allclose(same, [4.0, 4.0, 2.0])


def test_drift_of_a_policy_that_cannot_learn_is_none() -> None:
    kinds = {"easy": random_traces(4, ease=3), "hard": random_traces(4, ease=0.5)}
    few: dict[str, Any] = {"period": 400, "rounds": 1, "seeds": (0,), "settling": 50}
    found = drift("fixed:2", kinds, COST, others={kind: own[:1] for kind, own in kinds.items()}, **few)
    np.testing.assert_allclose(found.relative, 1.0)
    np.testing.assert_allclose(found.unseen, 1.0)
    assert found.back == {"relative": 0, "unseen": 0}
    alone = drift("fixed:2", kinds, COST, **few)
    assert len(as_rows("s", alone)) == len(as_rows("s", found)) - 2
    assert alone.unseen.shape == (0,)
    assert found.over_fixed[2] == pytest.approx(1)
    assert found.nearest.value <= 1 + 1e-12
    assert found.nearest.value == pytest.approx(found.over_fixed[found.nearest_gamma])
    assert found.changes == 2
    assert set(found.kinds) == {"easy", "hard"}  # changed to both, though it began with one of them
    assert np.isfinite(list(found.kinds.values())).all()
    again_ = Drift.from_json(json.loads(json.dumps(found.as_json())))
    assert as_rows("s", again_) == as_rows("s", found)


@pytest.mark.parametrize("spec", ["online", "linucb"])
def test_a_cold_start_knows_nothing_of_acceptance(spec: str) -> None:
    warm, other = (make_policy(spec, **given).state_dict() for given in ({}, cold(spec, 0)))
    assert warm.keys() == other.keys()
    assert any(not np.array_equal(warm[key], other[key]) for key in warm)


def test_what_has_settled_on_other_prompts_does_not_know_the_streams_own() -> None:
    """`online` remembers how drafts after the same tokens fared: one that has met the same prompts is ahead."""
    kinds, others = ({kind: [random_trace(first + i, kind) for i in range(6)] for kind in ("nf4", "int8")}
                     for first in (0, 100))  # fmt: skip
    found = drift("online", kinds, COST, others=others, period=400, rounds=1, seeds=(0,), settling=400)
    assert found.unseen.shape == found.relative.shape
    assert not np.allclose(found.unseen, found.relative)
    assert found.unseen.mean() > found.relative.mean()


@pytest.fixture
def folders(tmp_path: Path) -> str:
    """Two pairs of traces, as the commands take them."""
    good = save(random_traces(4, ("nf4", "int8"), ease=3), tmp_path / "good")
    weak = save(random_traces(4, ("nf4", "int8"), ease=0.5), tmp_path / "weak")
    return f"good={good},weak={weak}"


def test_the_commands_fill_a_document(tmp_path: Path, folders: str, capsys: pytest.CaptureFixture[str]) -> None:
    document, cost = tmp_path / "results.md", COST.save(tmp_path / "cost.json")
    head, tail = "# Results\n\nWords.\n", "\nMore words.\n"
    markers = [f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in ("replays", "streams")]
    document.write_text(head + "\n".join(markers) + tail)
    common = ["--traces", folders, "--costs", str(cost), "--doc", str(document)]
    more = ["--levels", "nf4", "--policies", "fixed:4,linucb", "--orders", "2", "--out", str(tmp_path / "replays")]
    assert replays.main([*common, *more]) == 0
    text = document.read_text()
    assert text.startswith(head)
    assert text.endswith(tail)
    assert "2 cells" in text
    assert "over `fixed:4`, geometric mean | 1.2 |" in text
    assert "### Pair weak, costs `test`" in text
    assert "Policies that raised" not in text
    more = ["--policies", "linucb", "--streams", "1", "--rounds", "1", "--period", "400"]
    more += ["--workers", "1,2", "--every", "1,50", "--steps", "60", "--walkers", "1", "--parts", "merge"]
    assert replays_streams.main([*common, *more, "--out", str(tmp_path / "streams")]) == 0
    both = document.read_text()
    assert "\nold\n" not in both
    assert "2 cells" in both
    assert "### Merging (modelled; good, test, int8" in both
    assert (tmp_path / "streams" / "merge.png").stat().st_size > 1000
    document.write_text(head)
    capsys.readouterr()
    compiled = ["--levels", "nf4", "--policies", "fixed:4", "--orders", "1", "--out", str(tmp_path / "replays")]
    assert replays.main([*common, *compiled]) == 2
    assert "lacks the lines <!-- replays: begin -->" in capsys.readouterr().err


def test_tables_say_whose_figures_are_not_their_own(
    tmp_path: Path, folders: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, *arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(LinUcb, "teach", broken)
    common = [
        "--traces",
        folders,
        "--costs",
        str(COST.save(tmp_path / "cost.json")),
        "--out",
        str(tmp_path / "replays"),
    ]
    assert replays.main([*common, "--levels", "nf4", "--policies", "fixed:4,linucb", "--orders", "1"]) == 0
    text = (tmp_path / "replays" / "replays.md").read_text()
    assert re.search(r"rows are not theirs: `linucb` [1-9]\d* times\.", text)


def test_streams_go_on_where_a_run_was_killed(tmp_path: Path, folders: str) -> None:
    out = tmp_path / "streams"
    flags = ["--traces", folders, "--parts", "merge", "--policies", "linucb", "--steps", "40", "--walkers", "2"]
    flags += ["--workers", "1,2", "--every", "5,50", "--level", "nf4", "--out", str(out)]
    assert replays_streams.main(flags) == 0
    log, table = out / "cells.jsonl", (out / "streams.md").read_text()
    whole = log.read_text()
    assert len(whole.splitlines()) == 4
    log.write_text(whole[:-9])  # killed while it wrote the last line
    assert replays_streams.main([*flags, "--processes", "2"]) == 0
    assert (out / "streams.md").read_text() == table
    assert log.read_text().startswith(whole[:-9] + "\n")
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    assert sorted(lines, key=str) == sorted(map(json.loads, whole.splitlines()), key=str)
    log.write_text(whole.replace(lines[0]["code"], "other"))
    assert replays_streams.main(flags) == 0  # what other policies did is not taken up
    assert len(log.read_text().splitlines()) == 8
    assert replays_streams.main([*flags, "--steps", "50"]) == 2


def test_settled_copies_meet_other_prompts_of_every_kind(
    tmp_path: Path, folders: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--traces", folders, "--parts", "drift", "--policies", "fixed:2", "--out", str(tmp_path / "streams")]
    few = save(random_traces(4, ("nf4",)), tmp_path / "few")
    for settled, message in (
        (folders, "has prompts of the streams"),
        (f"good={few},weak={few}", "no traces for"),
        ("nowhere", "--settled wants NAME=DIRECTORY"),
    ):
        assert replays_streams.main([*flags, "--settled", settled]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--traces", "nowhere"], "NAME=DIRECTORY"),
        (["--traces", "a=x,a=y"], "each name once"),
        (["--traces", "a=x", "--orders", "0"], "--orders must be at least 1"),
        (["--traces", "a=x", "--split", "both"], "--split must be"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert replays.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_pairs_may_have_prompts_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traces = random_traces(5, ("nf4",))
    own = save(traces, tmp_path / "own")
    other = save([replace(t, prompt_id=f"other-{t.prompt_id}") for t in traces[1:]] + traces[:1], tmp_path / "other")
    flags = ["--split", "all", "--policies", "fixed:2,online", "--orders", "1", "--out", str(tmp_path / "out")]
    assert replays.main(["--traces", f"own={own},other={other}", *flags]) == 0
    assert "Pair other" in capsys.readouterr().out
    assert replays.main(["--traces", f"own={own}", "--costs", "rtx3090-release,rtx3090-release", *flags]) == 2
    assert "two cost tables have the same name" in capsys.readouterr().err
