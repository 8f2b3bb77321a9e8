"""Merging on small traces, and the learner's benchmark on a real Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest

from experiments.bench.learner import BenchConfig, Load, judge, made_up_delta
from experiments.streams.merge import exchange
from experiments.streams.walker import Walker, endless
from policies.base import State
from policies.registry import make_policy
from speckv_online.errors import UserError
from speckv_online.simulate.cost_table import RTX3090_RELEASE as COST
from tests.support.random_traces import random_traces

ROOT = Path(__file__).parents[2]
TRACES = random_traces(6, ("int8",))


@pytest.mark.parametrize("delay", [0, 25, 1000])
def test_a_worker_has_all_that_it_sent_and_the_others_after_the_delay(delay: int) -> None:
    walkers = [Walker(make_policy("linucb:discount=1", seed=i, worker=i), endless(TRACES, i), COST) for i in range(3)]
    own = [0.0] * 3
    sent: deque[tuple[int, list[State]]] = deque()
    rounds: list[list[float]] = []  # what each worker sent, by round
    learner = make_policy("linucb:discount=1")
    for now in (10, 20, 30, 40):
        before = [known(walker) for walker in walkers]
        for walker in walkers:
            walker.advance(10)
        rounds.append([known(walker) - b for walker, b in zip(walkers, before, strict=True)])
        exchange(learner, walkers, sent, now, delay)
        own = [sum(row[i] for row in rounds) for i in range(3)]
        late = [row for at, row in zip((10, 20, 30, 40), rounds, strict=False) if at > now - delay]
        everything = sum(map(sum, rounds)) - sum(map(sum, late))
        for i, walker in enumerate(walkers):
            assert known(walker) == pytest.approx(everything + sum(row[i] for row in late))
    assert own[0] > 0


def known(walker: Walker) -> float:
    """Steps that taught a walker's policy something, merged ones included."""
    return float(walker.policy.state_dict()["linear.misc"][0])


def test_a_batch_is_as_large_whatever_it_holds() -> None:
    few, many = made_up_delta("linucb", 8), made_up_delta("linucb", 200)
    assert {key: value.shape for key, value in few.items()} == {key: value.shape for key, value in many.items()}
    learner = make_policy("linucb")
    learner.merge(many)
    assert learner.state_dict()["linear.misc"][0] > 100  # steps that taught something
    with pytest.raises(UserError, match="shares nothing"):
        made_up_delta("fixed:4", 8)


def test_the_bar_is_judged_by_processor_time() -> None:
    config = BenchConfig()
    compiled = [Load("online", n, 1000, 2.0, 1.0 + n / 10_000, 2000, 2000) for n in (8, 32, 2048)]
    assert [check["pass"] for check in judge(compiled, config)] == [True, True]
    slow = [Load("online", 32, 100, 1.0, 1.0, 2000, 2000), Load("online", 2048, 50, 1.0, 1.0, 2000, 2000)]
    assert [check["pass"] for check in judge(slow, config)] == [False, False]


@pytest.mark.ray
def test_the_benchmark_runs_on_a_real_ray() -> None:
    command = [sys.executable, "-m", "experiments.bench.learner", "--workers", "2", "--seconds", "1", "--json"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [*command, "--policies", "linucb", "--outcomes", "8,64"], capture_output=True, text=True, cwd=ROOT, env=env,
        timeout=240,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # whether the bar holds is a matter of the machine
    found = json.loads(done.stdout)
    assert [row["outcomes"] for row in found["rows"]] == [8, 64]
    assert all(row["batches"] > 0 and row["cpu"] > 0 for row in found["rows"])
    assert found["rows"][0]["sent"] == found["rows"][1]["sent"]
