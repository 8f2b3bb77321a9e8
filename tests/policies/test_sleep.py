"""Naps: a policy that gains nothing over plain decoding is asked ever more rarely, one that gains at every step."""

from __future__ import annotations

from math import log, sqrt

import numpy as np
import pytest

from policies.base import Context, Decision, Outcome, PolicyError
from policies.costs.cost_model import CostPrior
from policies.guards.safety import Asleep, SafetyGuard
from policies.guards.sleep import KEEP, LONGEST, PRIOR, SPREAD, STRETCH, SleepSchedule
from policies.registry import make_policy
from speckv_online.context import History
from tests.support.guarded import Stubborn, told
from tests.support.tapes import make_tapes, play


def stretch(sleep: SleepSchedule, tokens: float, seconds: float, plain: float = 0.1) -> bool:
    """One stretch awake, then the start of the next."""
    sleep.tokens, sleep.seconds = tokens, seconds
    return sleep.start(plain, allowed=True)


def test_the_bound_by_hand() -> None:
    """Three stretches at 100 ms a plain step: 64 tokens in 7.2 s lose 8, as many in 6.4 nothing, 65 gain 1."""
    sleep = SleepSchedule()
    assert sleep.bound() == float("inf")
    assert not sleep.start(0.1, allowed=True)
    stretch(sleep, 64, 7.2)
    stretch(sleep, 64, 6.4)
    assert sleep.bound() == float("inf")
    stretch(sleep, 65, 6.4)
    weights, gains = (64 * KEEP**2, 64 * KEEP, 65.0), (-8.0 * KEEP**2, 0.0, 1.0)
    total, mean = sum(weights), sum(gains) / sum(weights)
    count = total**2 / (64**2 * KEEP**2 + 64**2 * KEEP + 65**2)
    spread = (64 * KEEP**2 * (8 / 64) ** 2 + 65 * (1 / 65) ** 2) / total - mean**2
    variance = (PRIOR * SPREAD**2 + count * spread) / (PRIOR + count)
    everything = KEEP**3 + KEEP**2 + KEEP + 1
    assert sleep.bound() == pytest.approx(mean + sqrt(2 * variance * log(1 + everything) / count))


def test_the_clearer_the_loss_the_longer_the_sleep_but_never_for_good() -> None:
    """Of 1,000 stretches one that loses a tenth is awake for a few; one that breaks even or gains for nearly all."""

    def awake(gain: float, noise: float = 0.05) -> list[int]:
        sleep, rng, found = SleepSchedule(), np.random.default_rng(1), []
        for i in range(1000):
            if not sleep.start(0.1, allowed=True):
                found.append(i)
                sleep.tokens, sleep.seconds = 64.0, 6.4 * (1.0 - gain + noise * rng.normal())
        return found

    clear, slight = awake(-0.1), awake(-0.02)
    assert len(clear) < 80
    assert len(clear) < len(slight) < 700
    assert len([i for i in clear if i >= 500]) < len([i for i in clear if i < 500])
    assert np.diff(clear).max() <= LONGEST + 1
    assert len(awake(0.0)) > 900
    assert len(awake(0.03)) == 1000


def test_a_gain_that_comes_later_wakes_the_policy() -> None:
    sleep, rng, awake = SleepSchedule(), np.random.default_rng(2), []
    for i in range(500):
        if not sleep.start(0.1, allowed=True):
            awake.append(i)
            sleep.tokens = 64.0
            sleep.seconds = 6.4 * (1.1 if i < 300 else 0.8) + 0.3 * rng.normal()
    assert len([i for i in awake if 200 <= i < 300]) < 20
    assert len([i for i in awake if 300 + LONGEST <= i < 400]) > 50


def test_no_sleep_where_the_fixed_gamma_is_better() -> None:
    sleep = SleepSchedule()
    for _ in range(20):
        stretch(sleep, 64, 20.0)
    assert sleep.bound() < 0
    assert sleep.start(0.1, allowed=True)
    assert not sleep.start(0.1, allowed=False)


def test_the_policys_own_time_counts() -> None:
    """Plain steps of 100 ms of which the policy takes 20: it keeps pace with those of 100, not with those of 80."""
    idle, slow = SleepSchedule(), SleepSchedule()
    slow.spent(5.0)  # the first step, and a stall, count for little
    for _ in range(200):
        slow.spent(0.02)
    slow.spent(5.0)
    assert not any(stretch(idle, 64, 6.4) for _ in range(20))
    assert any(stretch(slow, 64, 6.4) for _ in range(20))


def played(sleeps: bool, texts: int = 120) -> tuple[SafetyGuard, float]:
    """Goodput of a policy that always drafts one token, where hardly any is right."""
    guard = told(SafetyGuard(Stubborn(1), epsilon=0.5, sleeps=sleeps), "nf4")
    return guard, play(guard, make_tapes(61, texts, length=64, ease=-4.0), "nf4", noise=0.0).goodput


def test_a_policy_that_loses_is_played_less() -> None:
    (guard, with_naps), (awake, without) = played(True), played(False)
    assert guard.info()["nf4.slept"] > 60
    assert "nf4.slept" not in awake.info()
    plain = 1.0 / 0.161
    assert with_naps - without > 0.5 * (plain - without)


def test_nobody_is_asked_or_taught_in_a_sleep() -> None:
    class Counting(Stubborn):
        asked = 0

        def decide(self, context: Context) -> Decision:
            self.asked += 1
            return super().decide(context)

    policy = Counting(2)
    guard = told(SafetyGuard(policy), "nf4")
    ledger = guard.ledger("nf4")
    sleep, ledger.baseline = ledger.sleep, 0
    for _ in range(20):
        stretch(sleep, 64, 64.0)
    sleep.latest = 0
    history = History("nf4", "", 5)
    for _ in range(STRETCH):
        decision = guard.decide(history.context())
        assert (decision.gamma, decision.propensity, type(decision.features)) == (0, 1.0, Asleep)
        outcome = Outcome(0, 0, 0, 1, 0.161, 0.0, 0.16, "nf4", history.context_length)
        guard.learn(decision, outcome)
        history.update(outcome)
    assert policy.asked == 0
    assert not policy._learnt
    for _ in range(LONGEST):  # stretches of a long text: awake again at the latest after so many
        history.position += STRETCH
        guard.decide(history.context())
    assert policy.asked > 0


def test_state() -> None:
    guard, _ = played(True, 40)
    again = told(SafetyGuard(Stubborn(1), epsilon=0.5), "nf4")
    again.load_state_dict(guard.state_dict())
    assert again.ledger("nf4").sleep.row() == guard.ledger("nf4").sleep.row()
    assert again.ledger("nf4").sleep.bound() == guard.ledger("nf4").sleep.bound()
    older = {key: value for key, value in guard.state_dict().items() if not key.startswith("safety_sleep")}
    again.load_state_dict(older)
    former = {key.replace("safety_sleep.", "safety_nap."): value for key, value in guard.state_dict().items()}
    restored = told(SafetyGuard(Stubborn(1), epsilon=0.5), "nf4")
    restored.load_state_dict(former)  # of version 0.1
    assert restored.ledger("nf4").sleep.row() == guard.ledger("nf4").sleep.row()
    for wrong in (np.zeros(3), np.full(9, np.nan), np.full(9, -1.0)):
        with pytest.raises(PolicyError, match=r"safety_sleep\.nf4"):
            again.load_state_dict(older | {"safety_sleep.nf4": wrong})


def test_naps_are_an_option() -> None:
    on, off = make_policy("online"), make_policy("online:naps=off")
    assert isinstance(on, SafetyGuard)
    assert isinstance(off, SafetyGuard)
    assert (on.sleeps, off.sleeps) == (True, False)
    off.model.set_prior("nf4", CostPrior(0.01, (0.1, 0.1)))
    sleep = off.ledger("nf4").sleep
    for _ in range(4):
        stretch(sleep, 64, 64.0)
    assert sleep.bound() < 0
    assert type(off.decide(Context(level="nf4")).features) is not Asleep
