"""The fault guard: nothing that a policy does wrong gets through, and nothing right is changed."""

from __future__ import annotations

import logging
import pickle
import time
from typing import Any

import numpy as np
import pytest

from policies.base import Context, Decision, Draft, Outcome, Policy, PolicyError
from policies.costs.cost_model import CostPrior
from policies.fixed import Fixed
from policies.guards.fault import FaultGuard
from policies.learned.linear import LinTs
from tests.support.tapes import trained

SIGNALS = np.zeros((16, 4))


class Odd(Policy):
    """Answers with whatever it is given; a callable is called."""

    learns = True

    def __init__(self, gamma: Any = 4, propensity: Any = 1.0, answer: Any = True, submits: Any = 1) -> None:
        super().__init__()
        self.gamma, self.propensity, self.answer, self.submits, self.learnt = gamma, propensity, answer, submits, 0

    def decide(self, context: Context) -> Decision:
        gamma = self.gamma() if callable(self.gamma) else self.gamma
        return Decision(self.new_id(), gamma, True, self.propensity)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return self.answer() if callable(self.answer) else self.answer

    def submit(self, decision: Decision, draft: Draft) -> int:
        return self.submits() if callable(self.submits) else self.submits

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        self.learnt += 1
        raise RuntimeError("learn is broken")


def fail() -> Any:
    raise RuntimeError("broken")


@pytest.mark.parametrize("gamma", [fail, -1, 17, 10**9, 2.0, float("nan"), None, "4", True, np.float64(4)])
def test_impossible_decisions_fall_back(gamma: Any, caplog: pytest.LogCaptureFixture) -> None:
    guard = FaultGuard(Odd(gamma), fallback_gamma=3)
    with caplog.at_level(logging.WARNING):
        decisions = [guard.decide(Context()) for _ in range(5)]
    assert [d.gamma for d in decisions] == [3] * 5
    assert len({d.id for d in decisions}) == 5
    assert all(d.id < 0 and not d.ask_per_token for d in decisions)
    assert guard.faults.total() == 5
    assert len(caplog.records) == 1
    assert "Odd" in caplog.text
    assert guard.decide(Context(max_gamma=1)).gamma == 1


@pytest.mark.parametrize("propensity", [float("nan"), float("inf"), 0.0, -0.5, 1.5, np.nan])
def test_impossible_propensities_fall_back(propensity: float) -> None:
    guard = FaultGuard(Odd(2, propensity))
    assert guard.decide(Context()).gamma == 4
    assert guard.faults == {"impossible propensity": 1}


@pytest.mark.parametrize(
    ("gamma", "limit", "want"), [(4, 16, 4), (16, 5, 5), (np.int64(7), 16, 7), (3, 0, 0), (0, 9, 0)]
)
def test_valid_decisions_pass_and_keep_their_ids(gamma: Any, limit: int, want: int) -> None:
    policy = Odd(gamma)
    guard = FaultGuard(policy)
    decision = guard.decide(Context(max_gamma=limit))
    assert decision.gamma == want
    assert type(decision.gamma) is int
    assert decision.id == policy._id
    assert not guard.faults


def test_faults_while_drafting() -> None:
    decision = Decision(1, 4, True)
    for answer, kind in ((fail, "proceed raised"), (None, "impossible answer"), (np.nan, "impossible answer")):
        guard = FaultGuard(Odd(answer=answer))
        assert guard.proceed(decision, Draft(1, SIGNALS[:1])) is False
        assert guard.faults == {kind: 1}
    for submits, kind in (
        (fail, "submit raised"),
        (5, "impossible answer"),
        (-1, "impossible answer"),
        (1.5, "submit raised"),
    ):
        guard = FaultGuard(Odd(submits=submits))
        assert guard.submit(decision, Draft(4, SIGNALS[:4])) == 4
        assert guard.faults == {kind: 1}
    fine = FaultGuard(Odd(answer=np.True_, submits=2))
    assert fine.proceed(decision, Draft(1, SIGNALS[:1])) is True
    assert fine.submit(decision, Draft(4, SIGNALS[:4])) == 2
    assert not fine.faults


def test_faults_while_learning_are_counted_and_swallowed() -> None:
    policy = Odd()
    guard = FaultGuard(policy)
    guard.learn(guard.decide(Context()), Outcome(4, 2, 3, 3))
    assert (policy.learnt, guard.faults) == (1, {"learn raised": 1})
    assert guard.info()["faults"] == {"learn raised": 1}


def test_the_policy_does_not_learn_from_decisions_it_did_not_make() -> None:
    policy = Odd(fail)
    guard = FaultGuard(policy)
    guard.learn(guard.decide(Context()), Outcome(4, 2, 3, 3))
    assert policy.learnt == 0


def test_a_stalling_policy_sits_out_longer_and_longer() -> None:
    calls: list[int] = []

    def slow() -> int:
        calls.append(1)
        time.sleep(0.02)
        return 2

    guard = FaultGuard(Odd(slow), fallback_gamma=5, stall_seconds=0.005)
    gammas = [guard.decide(Context()).gamma for _ in range(11)]
    assert gammas == [2, 5, 2, 5, 5, 2, 5, 5, 5, 5, 2]
    assert (len(calls), guard.faults) == (4, {"stalled": 4})


def test_calls_that_are_slow_after_the_decision_count_too() -> None:
    """A caller that looks at the clock says what all calls of a step took; replays say nothing."""
    guard = FaultGuard(Odd(2), stall_seconds=0.5)
    for seconds, faults in ((0.0, 0), (0.4, 0), (0.6, 1)):
        guard.learn(guard.decide(Context()), Outcome(2, 2, 2, 3, policy_seconds=seconds))
        assert guard.faults["stalled"] == faults
    assert guard.decide(Context()).id < 0
    assert guard.decide(Context()).id > 0


def test_a_slow_decision_counts_once_in_a_batch_too() -> None:
    """Another row sits out in its place before its outcome is known."""
    guard = FaultGuard(Odd(lambda: time.sleep(0.02) or 2), stall_seconds=0.005)
    slow = guard.decide(Context())
    assert guard.decide(Context()).id < 0
    guard.learn(slow, Outcome(2, 2, 2, 3, policy_seconds=0.02))
    assert guard.faults["stalled"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_signals_that_are_no_numbers_teach_nothing(bad: float) -> None:
    policy = Odd()
    guard = FaultGuard(policy)
    signals = np.full((4, 4), 0.5)
    signals[2, 1] = bad
    guard.learn(guard.decide(Context()), Outcome(4, 2, 3, 3, signals=signals))
    assert (policy.learnt, guard.faults) == (0, {"signals that are no numbers": 1})


def test_a_policy_that_does_not_take_costs_goes_without() -> None:
    class Picky(Odd):
        def set_costs(self, level: str, prior: CostPrior) -> None:
            raise RuntimeError("not these")

    guard = FaultGuard(Picky(2))
    guard.set_costs("nf4", CostPrior(0.01, (0.1,)))
    assert guard.faults == {"set_costs raised": 1}
    assert guard.decide(Context()).gamma == 2
    FaultGuard(Fixed()).set_costs("nf4", CostPrior(0.01, (0.1,)))  # it does not ask
    lints = LinTs(weights=trained())
    FaultGuard(lints).set_costs("nf4", CostPrior(0.01, (0.1,)))
    assert lints.costs.level("nf4").verify[0] == pytest.approx(0.1)


def test_everything_else_reaches_the_policy() -> None:
    policy = LinTs(weights=trained(), seed=4)
    guard = FaultGuard(policy)
    assert guard.learns
    assert guard.summary == policy.summary
    assert guard.arms == policy.arms
    assert guard.pmf(Context()) == pytest.approx(policy.pmf(Context()))
    guard.learn(guard.decide(Context()), Outcome(4, 2, 3, 3, 0.1, 0.02, 0.07))
    assert guard.state_dict()["linear.misc"][0] == 1
    assert guard.take_delta()["linear.count"] == 1
    other = FaultGuard(LinTs(weights=trained()))
    other.load_state_dict(guard.state_dict())
    assert other.state_dict()["linear.sums"] == pytest.approx(policy.state_dict()["linear.sums"])
    with pytest.raises(AttributeError):
        _ = guard.no_such_thing


def test_copies_work() -> None:
    assert pickle.loads(pickle.dumps(FaultGuard(Fixed(gamma=2)))).decide(Context()).gamma == 2


def test_bad_fallbacks_are_refused() -> None:
    with pytest.raises(PolicyError, match="fallback_gamma"):
        FaultGuard(Fixed(), fallback_gamma=17)
