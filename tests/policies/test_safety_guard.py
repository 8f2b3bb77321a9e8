"""The safety guard: holds bad policies to the better baseline, leaves good ones alone, and keeps probing."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import Context, Decision, Draft, Outcome, PolicyError
from policies.costs.cost_model import CostPrior
from policies.fixed import Fixed
from policies.guards.fault import FaultGuard
from policies.guards.safety import SafetyGuard
from policies.learned.linear import LinUcb
from policies.learned.online import Online
from policies.registry import make_policy
from tests.support.guarded import Stubborn, told
from tests.support.tapes import make_tapes, play, trained


class Timid(Stubborn):
    """Wants 16 tokens, but stops after the first."""

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(16, context.max_gamma), ask_per_token=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return False


def test_a_lookup_s_empty_hands_are_not_held_against_a_policy() -> None:
    """Where verifying costs the same at any width and drafts are free, as long a draft as possible is best: the fixed
    gamma of the comparison would have had no more to draft than what there was."""
    rng, guard = np.random.default_rng(5), SafetyGuard(Stubborn(16))
    guard.model.set_prior("fp16", CostPrior(0.0, (0.02, 0.02), 0.0))
    tokens = seconds = 0.0
    for _ in range(1500):
        decision = guard.decide(Context())
        there, run = int(rng.choice([0, 0, 16])), int(rng.geometric(0.3)) - 1
        k = min(decision.gamma, there)
        n = min(run, k)
        spent = Outcome(k, n, min(n + 1, k), n + 1, 0.02, 0.0, 0.02, forwards=0, exhausted=k == there < 16)
        guard.learn(decision, spent)
        tokens, seconds = tokens + n + 1, seconds + 0.02
    assert guard.ledger("fp16").interventions == 0
    assert guard.ledger("fp16").offered == pytest.approx(1 / 3, abs=0.2)
    assert tokens / seconds > 80


@pytest.mark.parametrize(
    ("level", "gamma"), [("fp16", 16), ("fp16", 2), ("int8", 0), ("int8", 16), ("nf4", 16), ("nf4", 0)]
)
def test_the_guarantee(level: str, gamma: int) -> None:
    """Whatever the policy does: tokens >= (1 - epsilon) * best baseline rate * seconds - burn-in - step - probes."""
    tapes = make_tapes(51, 25)
    plain, fixed = (play(Fixed(gamma=g), tapes, level, noise=0.0).goodput for g in (0, 4))
    guard = told(SafetyGuard(Stubborn(gamma), gamma=4, epsilon=0.05, burn_in=30), level)
    run = play(guard, tapes, level, noise=0.0)
    assert run.tokens >= 0.95 * max(plain, fixed) * run.seconds - 30 - 10 - _probes(guard, level)
    if gamma != 2:
        assert guard.ledger(level).interventions > 50


def _probes(guard: SafetyGuard, level: str) -> float:
    """What the probes may have cost, in tokens: less than two each."""
    return 2.0 * sum(guard.ledger(level).probes)


@pytest.mark.parametrize(("slower", "void"), [(1.0, False), (1.1, False), (3.0, True), (0.4, True)])
def test_a_debt_that_another_machine_s_seconds_made_is_void(slower: float, void: bool) -> None:
    """It says nothing of the policy; a debt under the seconds of this machine is paid off."""
    guard = SafetyGuard(Stubborn(0))
    guard.model.set_prior("fp16", CostPrior(0.001, (0.01, 0.01), 0.0))
    guard.ledger("fp16").budget = -40.0
    for _ in range(40):
        k = guard.decide(Context()).gamma
        decision = Decision(guard.policy.new_id(), k)
        draft, verify = slower * 0.001 * k, slower * 0.01
        guard.learn(decision, Outcome(k, 0, min(k, 1), 1, draft + verify, draft, verify))
    assert (guard.ledger("fp16").budget > -20.0) == void


def test_a_good_policy_is_left_alone() -> None:
    tapes = make_tapes(52, 20)
    guard = told(SafetyGuard(Stubborn(2)), "nf4")
    run = play(guard, tapes, "nf4")
    assert guard.ledger("nf4").interventions == 0
    assert np.mean([g == 2 for g in run.gammas]) > 0.9


def test_reading_late_counts_against_no_draft_only() -> None:
    """A fixed gamma would have had to read the prompt as well; plain decoding would not."""
    for t_d, better in ((0.02, 0), (0.001, 4)):
        budgets = []
        for behind in (0, 200):
            guard = SafetyGuard(Stubborn(1))
            guard.model.set_prior("fp16", CostPrior(t_d, (0.02,), catch_up_seconds=1e-4))
            decision = guard.decide(Context())
            guard.learn(decision, Outcome(1, 1, 1, 2, caught_up=behind))
            assert guard.ledger("fp16").baseline == better
            budgets.append(guard.ledger("fp16").budget)
        spent = 0.95 * 200 * 1e-4 / 0.02 if better == 0 else 0.0
        assert budgets[0] - budgets[1] == pytest.approx(spent, rel=0.02, abs=1e-9)


def test_probes_fall_but_never_end() -> None:
    """j-th probe of either baseline at step 16 j^2, or at 256 j^2 where it is far worse, unless the policy itself has
    played it meanwhile."""
    guard = told(SafetyGuard(Stubborn(2), epsilon=0.9), "nf4")
    gammas = []
    for i in range(3000):
        decision = guard.decide(Context(level="nf4", step=i))
        gammas.append(decision.gamma)
        k = decision.gamma
        guard.learn(
            decision, Outcome(k, k, k, k + 1, 0.2 + 0.02 * k, 0.01 * k, 0.2 + 0.01 * k, "nf4", 100, 0, np.zeros((k, 4)))
        )
    for gamma, spacing, late in ((0, 256, 2000), (4, 16, 2500)):  # gamma 0 has a third of the policy's rate here
        at = np.flatnonzero(np.array(gammas) == gamma)
        assert len(at) == pytest.approx((3000 / spacing) ** 0.5, abs=2)
        assert at[-1] > late
        assert (np.diff(np.diff(at)[1:]) >= 0).mean() > 0.8


@pytest.mark.parametrize("most", [1, 3, 4])
def test_probes_go_on_where_no_step_may_draft_as_many_as_the_fixed_gamma(most: int) -> None:
    """The fixed gamma comes down to what a step may draft, and is probed, judged and played as that."""
    guard = told(SafetyGuard(Stubborn(0)), "int8")
    tokens, gammas = 0, []
    for i in range(400):
        decision = guard.decide(Context(level="int8", step=i, position=i, max_gamma=most))
        k = decision.gamma
        assert k <= most
        gammas.append(k)
        tokens += k + 1
        seconds = 0.251 + 0.014 * k
        signals = np.zeros((k, 4))
        guard.learn(decision, Outcome(k, k, k, k + 1, seconds, 0.01 * k, 0.25 + 0.004 * k, "int8", 100, 0, signals))
    ledger = guard.ledger("int8")
    assert ledger.gamma == most
    assert ledger.tokens / ledger.fixed_steps == pytest.approx(most + 1, rel=0.1)
    # All are right, so that drafting pays: past the burn-in the guard plays it most of the time.
    assert np.mean(np.array(gammas[100:]) == most) > 0.75
    assert ledger.probes[1] > 2


def test_near_the_end_of_a_text_nothing_is_judged_anew() -> None:
    guard = told(SafetyGuard(Stubborn(0)), "nf4")
    for most in (16, 2, 1, 0):
        guard.decide(Context(level="nf4", max_gamma=most))
        assert guard.ledger("nf4").gamma == 4


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_gammas_of_any_whole_type_are_guarded(kind: type) -> None:
    class Typed(Stubborn):
        def decide(self, context: Context) -> Decision:
            return Decision(self.new_id(), kind(min(self.gamma, context.max_gamma)))

    guard = FaultGuard(told(SafetyGuard(Typed(16)), "fp16"))
    play(guard, make_tapes(57, 6), "fp16")
    assert guard.ledger("fp16").interventions > 50
    assert not guard.faults


def test_drafts_that_were_withheld_are_paid_for() -> None:
    """Four forwards and the reading of 50 tokens, whether or not any token was submitted."""
    prior = CostPrior(0.001, (0.05, 0.05), catch_up_seconds=0.001, first_draft_seconds=0.04)
    spent = []
    for k in (0, 1):
        guard = SafetyGuard(Stubborn(4))
        guard.model.set_prior("fp16", prior)
        decision = guard.decide(Context())
        guard.learn(decision, Outcome(k, 0, k, 1, caught_up=50, forwards=4))
        spent.append(guard.ledger("fp16").sleep.seconds)
    assert spent == pytest.approx([0.05 + 0.04 + 0.004 + 0.05] * 2)


def test_a_policy_stuck_at_zero_is_shown_drafting_and_comes_back() -> None:
    """Warm-started from weights that promise nothing, `linucb` alone never drafts; guarded, it learns better."""
    w = trained()
    gloomy = type(w)(w.W1, w.b1, np.zeros_like(w.W2), np.array([0.02]), w.phi_cov)
    tapes = make_tapes(53, 30, ease=1.0)
    alone = LinUcb(alpha=0.0, weights=gloomy)
    guarded = SafetyGuard(LinUcb(alpha=0.0, weights=gloomy))
    assert set(play(alone, tapes, "int8").gammas) == {0}
    late = play(guarded, tapes, "int8").gammas[-200:]
    assert np.mean(late) > 2


STOPPING = ("llamacpp:0.6,n_max=16", "llamacpp:0.3,n_max=16", "svip")


def tokens_of_the_fixed_gamma(spec: str, seed: int, noise: float) -> tuple[float, float]:
    """Tokens per step of gamma 4 as the guard of a policy that stops by itself estimates them, and as they are."""
    tapes = make_tapes(seed, 60)
    want = play(Fixed(gamma=4), tapes, "nf4")
    guard = told(SafetyGuard(make_policy(spec), epsilon=0.5), "nf4")
    play(guard, tapes, "nf4", noise)
    ledger = guard.ledger("nf4")
    return ledger.tokens / ledger.fixed_steps, want.tokens / len(want.gammas)


def test_the_fixed_gammas_tokens_are_not_flattered_by_a_stopping_policy() -> None:
    """A policy that stops where acceptance is low leaves only easy tokens tested; the estimate sees through that."""
    for spec in STOPPING:
        estimate, want = tokens_of_the_fixed_gamma(spec, 54, noise=0.0)
        assert estimate == pytest.approx(want, rel=0.15)


def test_the_fixed_gammas_tokens_are_right_on_average_where_times_vary() -> None:
    """Varying times shift the probes, of which there are some 30: one stream's estimate is partly luck."""
    for spec in STOPPING:
        found = [tokens_of_the_fixed_gamma(spec, seed, noise=0.05) for seed in (54, 55, 56, 57)]
        ratios = [estimate / want for estimate, want in found]
        assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)
        assert ratios == pytest.approx([1.0] * len(ratios), abs=0.25)


def test_probes_of_a_stopping_policy_draft_on_and_ask_its_opinion() -> None:
    guard = told(SafetyGuard(Timid(0)), "nf4")
    for _ in range(2):
        decision = guard.decide(Context(level="nf4"))
    assert (decision.gamma, decision.ask_per_token) == (4, True)
    signals = np.zeros((16, 4))
    assert guard.proceed(decision, Draft(1, signals[:1]))
    assert guard.submit(decision, Draft(4, signals[:4])) == 4
    guard.learn(decision, Outcome(4, 3, 4, 4, 0.3, 0.04, 0.25, "nf4", 100, 0, signals[:4]))
    ledger = guard.ledger("nf4")
    # Two of the three tokens past its stop were accepted, the third was not; two pseudo-steps at one half.
    assert ledger.seen == [3, 3, 3, 3]
    assert ledger.more == [2 * 0.5 + 1, 2 * 0.75 + 2, 2 * 0.875 + 2, 2 * 0.9375 + 2]


def test_budget_stays_within_bounds_and_is_saved(tmp_path: object) -> None:
    tapes = make_tapes(55, 10)
    guard = told(SafetyGuard(Stubborn(16)), "fp16")
    play(guard, tapes, "fp16")
    ledger = guard.ledger("fp16")
    assert -guard.burn_in <= ledger.budget <= 4 * guard.burn_in
    np.savez(f"{tmp_path}/s.npz", **guard.state_dict())
    again = SafetyGuard(Stubborn(16))
    with np.load(f"{tmp_path}/s.npz", allow_pickle=False) as file:
        again.load_state_dict(dict(file))
    assert again.ledger("fp16").row() == pytest.approx(ledger.row())
    with pytest.raises(PolicyError, match="not a ledger of safety gamma 4"):
        again.load_state_dict(guard.state_dict() | {"safety.fp16": np.zeros(3)})


def test_merged_statistics_leave_the_ledger_alone() -> None:
    worker, learner = make_policy("online", weights=trained()), make_policy("online", weights=trained())
    play(worker, make_tapes(56, 4), "nf4")
    before = worker.ledger("nf4").row()
    learner.merge(worker.take_delta())
    worker.load_state_dict(learner.state_dict())
    assert worker.ledger("nf4").row() == before


def test_learned_policies_are_guarded_by_default() -> None:
    assert isinstance(make_policy("online", weights=trained()), SafetyGuard)
    assert isinstance(make_policy("online:safety=off"), Online)
    guard = make_policy("online:safety_gamma=2,safety_epsilon=0.2")
    assert isinstance(guard, SafetyGuard)
    assert (guard.gamma, guard.epsilon) == (2, 0.2)
    assert not isinstance(make_policy("leviathan"), SafetyGuard)
    with pytest.raises(PolicyError, match="online: the safety gamma"):
        make_policy("online:safety_gamma=0")
    with pytest.raises(PolicyError, match="unknown option 'safety'"):
        make_policy("fixed:safety=off")


def test_faults_of_the_policy_reach_the_fault_guard() -> None:
    class Broken(Stubborn):
        def decide(self, context: Context) -> Decision:
            return Decision(self.new_id(), -3)

    guard = FaultGuard(SafetyGuard(Broken(0)))
    assert guard.decide(Context()).gamma == 4
    assert guard.faults == {"impossible gamma": 1}


def test_an_estimate_of_another_time_is_given_up() -> None:
    """A draft that was always right is replaced by one that never is: the old rate must not be held on to."""
    guard = told(SafetyGuard(Stubborn(16)), "nf4")
    for i in range(1200):
        decision = guard.decide(Context(level="nf4", step=i))
        k = decision.gamma
        n = k if i < 600 else 0
        seconds = 0.161 + 0.002 * k
        outcome = Outcome(
            k, n, min(n + 1, k), n + 1, seconds, 0.001 * k, 0.16 + 0.001 * k, "nf4", 100, 0, np.zeros((k, 4))
        )
        guard.learn(decision, outcome)
        if i == 599:
            before = guard.ledger("nf4").tokens / guard.ledger("nf4").fixed_steps
    ledger = guard.ledger("nf4")
    assert before > 4.5
    assert ledger.tokens / ledger.fixed_steps < 1.2


def test_a_policy_that_has_seen_the_change_is_not_held_back() -> None:
    """It drafts four tokens while they are right and one after that; what four used to bring is no reproach to it."""
    rng, policy = np.random.default_rng(0), Stubborn(4)
    guard = told(SafetyGuard(policy), "nf4")
    for i in range(1600):
        policy.gamma = 4 if i < 600 else 1
        decision = guard.decide(Context(level="nf4", step=i))
        k, rate = decision.gamma, 0.95 if i < 600 else 0.1
        n = int(np.argmin(np.append(rng.random(k) < rate, False)))
        seconds = 0.161 + 0.002 * k
        outcome = Outcome(
            k, n, min(n + 1, k), n + 1, seconds, 0.001 * k, 0.16 + 0.001 * k, "nf4", 100, 0, np.zeros((k, 4))
        )
        guard.learn(decision, outcome)
    ledger = guard.ledger("nf4")
    assert ledger.interventions == 0
    assert ledger.tokens / ledger.fixed_steps == pytest.approx(1.111, abs=0.1)
