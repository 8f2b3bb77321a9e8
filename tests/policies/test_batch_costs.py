"""Seconds and decisions of batches, on made-up machines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from policies.base import N_SIGNALS, Context, Outcome, PolicyError
from policies.batches import Forward
from policies.costs.batch_costs import BatchCosts
from policies.costs.batch_grid import MOST
from policies.costs.level_costs import LevelCosts
from policies.costs.prior import CostPrior
from policies.guards.batch_guard import BatchGuard
from policies.guards.safety import SafetyGuard
from policies.learned.batch_rule import Prices, tables
from policies.learned.online import Online
from policies.registry import make_policy


def seconds(n: int) -> float:
    return 0.010 + 0.002 * n


def forward(rows: int, tokens: int, rounds: int = 0, forwards: int = 0, read: int = 0, noise: float = 1.0) -> Forward:
    drafting = (0.001 * rounds + 0.0002 * forwards + 0.0001 * read) * noise
    verify = seconds(tokens) * noise
    total = verify + drafting + 0.0001 * rows
    return Forward("fp16@8", rows, tokens, rounds, forwards, read, total, drafting, verify)


def taught(steps: int = 300, seed: int = 0) -> BatchCosts:
    costs, rng = BatchCosts(), np.random.default_rng(seed)
    for _ in range(steps):
        rows = int(rng.integers(2, 9))
        rounds = int(rng.integers(0, 4))
        forwards = rounds * int(rng.integers(1, rows + 1))
        read = int(rng.integers(0, 100)) if rounds else 0
        costs.observe(forward(rows, rows + forwards, rounds, forwards, read, float(np.exp(0.05 * rng.normal()))))
    return costs


def test_seconds_are_one_function_of_tokens() -> None:
    costs = taught()
    for n in (2, 5, 8, 12, 20, 30):
        assert costs.verify[n] == pytest.approx(seconds(n), rel=0.06)
    assert costs.drafting(2, 10, 50) == pytest.approx(0.009, rel=0.1)
    assert costs.plain(4) == pytest.approx(seconds(4) + 0.0004, rel=0.06)
    assert costs.doubt(4, 8) < 0.1 < BatchCosts().doubt(4, 8)
    assert (np.diff(costs.verify) >= 0).all()


def test_a_stall_moves_nothing_by_much() -> None:
    costs = taught()
    before = costs.verify[8]
    costs.observe(forward(8, 8, noise=200.0))
    for _ in range(8):
        costs.observe(forward(8, 8))
    assert costs.verify[8] == pytest.approx(before, rel=0.05)


def test_single_decoding_tells_the_shape() -> None:
    alone = LevelCosts(CostPrior(0.001, tuple(seconds(n) for n in range(1, 18)), weight=20.0))
    costs = BatchCosts(alone=alone)
    assert costs.ready
    assert costs.verify[32] == pytest.approx(seconds(32), rel=0.02)
    assert not BatchCosts(alone=LevelCosts()).ready


def test_sums_add_up_and_come_back() -> None:
    one, other, both = BatchCosts(), BatchCosts(), BatchCosts()
    for i in range(40):
        (one if i % 2 else other).observe(forward(4, 4 + i % 5))
    both.merge(one.take_delta())
    both.merge(other.take_delta())
    assert both.verify[6] == pytest.approx(seconds(6), rel=0.1)
    again = BatchCosts()
    again.load(one.state())
    assert again.verify == one.verify
    assert len(again.verify) == MOST + 1
    with pytest.raises(PolicyError):
        again.load(one.state() | {"shape": -np.ones(MOST)})


def prices(pads: bool = False, may_drop: bool = True, rows: int = 4) -> Prices:
    return Prices.of(taught(), rows, 1.0, pads, may_drop)


def test_what_is_submitted_is_the_best_choice() -> None:
    """Against all choices of how many tokens of each row."""
    rng = np.random.default_rng(1)
    for pads in (False, True):
        found = prices(pads, rows=3)
        for _ in range(40):
            survivals = [np.cumprod(rng.uniform(0.4, 1.0, int(rng.integers(1, 4)))).tolist() for _ in range(3)]
            worth = rng.uniform(0.5, 2.0, 3).tolist()

            def net(counts: tuple[int, ...], found=found, survivals=survivals, worth=worth, pads=pads) -> float:
                gain = sum(w * sum(s[:k]) for w, s, k in zip(worth, survivals, counts, strict=True))
                return gain - float(found.wider[3 * max(counts) if pads else sum(counts)])

            choices = [(a, b, c) for a in range(len(survivals[0]) + 1) for b in range(len(survivals[1]) + 1)
                       for c in range(len(survivals[2]) + 1)]  # fmt: skip
            best = max(net(choice) for choice in choices)
            chosen = tuple(found.best(survivals, worth))
            assert net(chosen) >= best - 0.02


def test_option_tables() -> None:
    gain, passes = tables()
    assert gain[32, 0] == pytest.approx(0.5, abs=0.01)
    assert gain[32, 64] == pytest.approx(0.0, abs=1e-6)
    assert passes[32, 32] == pytest.approx(0.5, abs=0.02)
    assert (np.diff(gain, axis=1) <= 1e-12).all()


def test_a_last_row_is_worth_more() -> None:
    worth = prices().worth([3, 40, 3, 3])
    assert worth[1] > 2 * worth[0]
    even = prices().worth([20, 20, 20, 20])
    assert np.ptp(even) < 1e-9


def test_wider_batches_draft_less() -> None:
    """Where a forward's seconds grow with its tokens, a token that pays for two rows does not for sixteen."""
    drafted = {}
    for rows in (2, 16):
        policy = make_policy("online", bare=True)
        assert isinstance(policy, Online)
        policy.batch_costs.levels["fp16"] = taught()
        context = Context(level=f"fp16@{rows}", rows=rows, remaining=40, lookup_alternative=0.55, unread=120)
        contexts = [replace(context, memory={}) for _ in range(rows)]
        drafted[rows] = sum(d.gamma > 0 for d in policy.decide_rows(contexts, False, True))
    assert drafted[2] == 2
    assert drafted[16] == 0


@pytest.mark.parametrize("learn", ["all", "costs", "none"])
def test_a_batch_learns_what_it_may(learn: str) -> None:
    policy = make_policy(f"online:learn={learn}", bare=True)
    assert isinstance(policy, Online)
    policy.batch_costs.levels["fp16"] = taught()
    before = policy.state_dict()
    for i in range(40):
        contexts = [Context(level="fp16@8", rows=2, remaining=40, lookup_alternative=0.55, unread=9) for _ in range(2)]
        decisions = policy.decide_rows(contexts, False, True)
        assert all(decision.gamma for decision in decisions)
        signals = np.tile([1.0, 0.5, *[0.1] * (N_SIGNALS - 2)], (2, 1))
        made = [Outcome(2, i % 2, i % 2 + 1, i % 2 + 1, level="fp16@8", signals=signals) for _ in range(2)]
        policy.learn_rows(decisions, made, forward(2, 6, 2, 4, noise=1.5))
    changed = {key for key, value in policy.state_dict().items() if not np.array_equal(value, before.get(key))}
    costs = {key for key in changed if key.startswith("batch_costs.")}
    assert bool(costs) == (learn != "none")
    assert bool(changed - costs) == (learn == "all")
    assert bool(policy.account("fp16@8").tokens) == (learn != "none")


def guarded() -> tuple[SafetyGuard, BatchGuard]:
    guard = make_policy("online")
    assert isinstance(guard, SafetyGuard)
    guard.policy.batch_costs.levels["fp16"] = taught()  # type: ignore[attr-defined]
    return guard, guard.rows


def test_the_guard_bounds_what_a_batch_loses() -> None:
    """Drafts that are never right: what is lost to plain batches stays within the burn-in, and the share allowed."""
    guard, rows = guarded()
    produced = plain = 0.0
    for _ in range(600):
        if guard.rests("fp16@8", 8):
            produced, plain = produced + 8, plain + 8
            continue
        decisions = guard.decide_rows([Context(level="fp16@8", rows=8, remaining=500) for _ in range(8)], False, True)
        step = forward(8, 24, 2, 16)
        guard.learn_rows(decisions, [Outcome(2, 0, 0, 1, level="fp16@8") for _ in decisions], step)
        produced, plain = produced + 8, plain + 8 * step.seconds / (seconds(8) + 0.0008)
    assert plain - produced < rows.burn_in + 0.05 * plain + 20
    assert guard.info()["fp16@8.held_back"] + guard.info().get("fp16@8.slept", 0) > 0


def test_a_batch_sleeps_where_asking_does_not_pay() -> None:
    guard, _ = guarded()
    asked = 0
    for _ in range(1500):
        if guard.rests("fp16@8", 8):
            continue
        asked += 1
        decisions = guard.decide_rows([Context(level="fp16@8", rows=8, remaining=500) for _ in range(8)], False, True)
        step = forward(8, 8)
        step.policy_seconds = 0.002
        guard.learn_rows(decisions, [Outcome(0, 0, 0, 1, level="fp16@8") for _ in decisions], step)
    assert asked < 750
