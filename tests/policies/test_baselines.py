"""Each baseline against sequences worked out by hand from its source."""

from __future__ import annotations

import math

import numpy as np
import pytest

from policies.base import Context, Decision, Draft, Outcome, Policy, PolicyError
from policies.baselines.adaedl import AdaEdl
from policies.baselines.banditspec import Exp3Spec, UcbSpec
from policies.baselines.engines.hf import Confidence, Heuristic, best_threshold
from policies.baselines.engines.llamacpp import LlamaCpp
from policies.baselines.engines.sglang import SgLang
from policies.baselines.engines.vllm import VllmAdaptive
from policies.baselines.leviathan import Leviathan, expected_tokens
from policies.baselines.specdecpp import SpecDecPlusPlus
from policies.baselines.svip import Svip
from policies.costs.cost_model import CostPrior
from policies.learned.linear import DIM, SIGNALS, LinUcb
from policies.level_features import N_LEVEL
from policies.registry import make_policy

LN2 = math.log(2)


def rows(
    *, entropy: list[float] | None = None, confidence: list[float] | None = None, margin: list[float] | None = None
) -> np.ndarray:
    """Signals of drafted tokens; entropies in bits."""
    length = len(entropy or confidence or margin or [])
    found = np.zeros((max(length, 16), 4))
    for column, values in enumerate((entropy, confidence, margin)):
        if values:
            found[:length, column] = values
    return found


def result(k: int, n: int, signals: np.ndarray | None = None, seconds: float = 0.0) -> Outcome:
    table = np.zeros((k, 4)) if signals is None else signals[:k]
    return Outcome(k, n, min(n + 1, k), n + 1, seconds, 0.0, seconds, "nf4", 100, 0, table)


def step(policy: Policy, n: int, limit: int = 16) -> int:
    """One step of a policy with a gamma, n of whose tokens are accepted (all, if fewer are drafted)."""
    decision = policy.decide(Context(level="nf4", max_gamma=limit))
    policy.learn(decision, result(decision.gamma, min(n, decision.gamma)))
    return decision.gamma


def stops_after(policy: Policy, signals: np.ndarray, limit: int = 16) -> tuple[int, int]:
    """(drafted, submitted) of one step."""
    decision = policy.decide(Context(max_gamma=limit))
    k = 0
    while k < decision.gamma:
        k += 1
        if decision.ask_per_token and k < decision.gamma and not policy.proceed(decision, Draft(k, signals[:k])):
            break
    return k, policy.submit(decision, Draft(k, signals[:k])) if decision.ask_per_token and k else k


def test_heuristic() -> None:
    policy = Heuristic()
    assert [step(policy, n) for n in (5, 3, 6, 0, 0, 0, 0, 0, 0, 0, 1)] == [5, 7, 6, 8, 7, 6, 5, 4, 3, 2, 1]
    assert policy.gamma == 3
    policy.begin(Context())
    assert policy.gamma == 3
    transient = Heuristic(transient=True)
    step(transient, 0)
    transient.begin(Context())
    assert transient.gamma == 5


def test_heuristic_takes_a_step_without_drafts_for_a_full_acceptance() -> None:
    """transformers: no match of no candidate; an accepted end-of-sequence token is no match."""
    policy = Heuristic()
    assert [step(policy, 0, limit=0) for _ in range(2)] == [0, 0]
    assert policy.gamma == 9
    decision = policy.decide(Context())
    policy.learn(decision, Outcome(9, 9, 9, 9, signals=np.zeros((9, 4))))
    assert policy.gamma == 8


def test_heuristic_grows_past_what_a_step_allows() -> None:
    policy = Heuristic(start=15)
    assert [step(policy, 99) for _ in range(3)] == [15, 16, 16]
    assert policy.gamma == 21


def test_confidence_stops_after_the_first_unsure_token() -> None:
    signals = rows(confidence=[0.9, 0.5, 0.39, 0.9])
    assert stops_after(Confidence(), signals) == (3, 3)
    assert stops_after(Confidence(), signals, limit=2) == (2, 2)
    assert stops_after(Confidence(threshold=0.0), signals) == (16, 16)


def test_confidence_threshold_by_hand() -> None:
    """Seven tokens logged: accepted at .9 .8 .6 .5, rejected at .7 .3 .2.

    Of the ROC's points, fpr + 3 fnr is 3 at the start, 2.25 at .9, 1.5 at .8, 1.83 at .7, 1.08 at .6, 0.33 at .5, then
    rises with every further false positive: the threshold is .5.
    """
    policy = Confidence()
    for n, confidence in ((2, [0.9, 0.8, 0.7, 0.99]), (1, [0.6, 0.3]), (1, [0.5, 0.2])):
        decision = policy.decide(Context())
        policy.learn(decision, result(len(confidence), n, rows(confidence=confidence)))
    assert policy.threshold == 0.5
    policy.begin(Context())
    assert policy.threshold == 0.4


def test_confidence_needs_more_than_five_tokens_and_both_outcomes() -> None:
    policy = Confidence()
    for id, confidence in ((1, 0.9), (2, 0.8)):
        policy.learn(Decision(id, 4), result(4, 4, rows(confidence=[confidence] * 4)))
    assert policy.threshold == 0.4
    policy.learn(Decision(3, 1), result(1, 0, rows(confidence=[0.1])))
    assert policy.threshold == 0.8


def test_confidence_threshold_is_scikit_learns() -> None:
    from sklearn.metrics import roc_curve

    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(6, 60))
        probs = np.round(rng.random(n), int(rng.integers(1, 4)))
        match = (rng.random(n) < probs).astype(float)
        if 0 < match.sum() < n:
            fpr, tpr, thresholds = roc_curve(match, probs)
            want = thresholds[np.argmin(fpr + 3 * (1 - tpr))]
            order = np.argsort(-probs, kind="stable")
            assert best_threshold(probs[order], match[order]) == want


@pytest.mark.parametrize(("nats", "goes_on"), [(0.59, True), (0.61, False)])
def test_svip(nats: float, goes_on: bool) -> None:
    """sqrt(0.15 H) > 0.3 from H = 0.6 nats on."""
    assert stops_after(Svip(), rows(entropy=[nats / LN2, 9.0])) == ((2, 2) if goes_on else (1, 1))


def test_adaedl_stops_at_its_bound() -> None:
    """1 - sqrt(0.2 H) < 0.4 from H = 1.8 nats on."""
    assert stops_after(AdaEdl(), rows(entropy=[1.79 / LN2, 1.81 / LN2, 0.0])) == (2, 2)
    assert stops_after(AdaEdl(), rows(entropy=[99.0])) == (1, 1)


def test_adaedl_threshold_by_hand() -> None:
    policy = AdaEdl(threshold=0.4)
    context = Context()
    policy.learn(policy.decide(context), result(2, 1))  # AR = .5 * .9 + .5 * .5 = .7 < .9: up by .01, a tenth of it
    assert (policy.rate, policy.threshold) == (pytest.approx(0.7), pytest.approx(0.401))
    policy.learn(policy.decide(context), result(4, 4))  # AR = .85
    assert (policy.rate, policy.threshold) == (pytest.approx(0.85), pytest.approx(0.402))
    policy.learn(policy.decide(context), result(4, 4))  # AR = .925, 4 of 16 accepted: down
    assert (policy.rate, policy.threshold) == (pytest.approx(0.925), pytest.approx(0.401))
    policy.learn(policy.decide(context), result(16, 16))  # all of k_max accepted: stays
    assert policy.threshold == pytest.approx(0.401)


def test_leviathan_expectation() -> None:
    assert expected_tokens(0.5, np.arange(4.0)) == pytest.approx([1, 1.5, 1.75, 1.875])
    assert expected_tokens(1.0, np.arange(4.0)) == pytest.approx([1, 2, 3, 4])


def test_leviathan_by_hand() -> None:
    """t_d = 1, T_v = 10: at alpha .5 E/T peaks at gamma 2 (1.75/12), at .8 at gamma 6, at .05 at 0."""
    for alpha, want in ((0.5, 2), (0.8, 6), (0.05, 0)):
        policy = Leviathan(start=alpha)
        policy.set_costs("nf4", CostPrior(1.0, (10.0, 10.0)))
        ratios = [sum(alpha**i for i in range(g + 1)) / (10 + g) for g in range(17)]
        assert ratios.index(max(ratios)) == want
        assert policy.decide(Context(level="nf4")).gamma == want


def test_leviathan_acceptance_is_exponentially_weighted() -> None:
    policy = Leviathan(half_life=1.0, start=0.5)
    policy.learn(policy.decide(Context(level="nf4")), result(4, 2))  # (5, 10) -> (2.5 + 2, 5 + 3)
    assert policy.alpha("nf4") == pytest.approx(4.5 / 8)
    policy.learn(policy.decide(Context(level="nf4")), result(0, 0))  # nothing tested, nothing forgotten
    assert policy.alpha("nf4") == pytest.approx(4.5 / 8)


def test_llamacpp() -> None:
    signals = rows(confidence=[0.9, 0.8, 0.5, 0.9])
    assert stops_after(LlamaCpp(), signals) == (3, 3)  # its defaults: three tokens, whatever they are
    assert stops_after(LlamaCpp(p_min=0.75, n_max=16), signals) == (3, 2)
    assert stops_after(LlamaCpp(p_min=0.75, n_max=16, n_min=3), signals) == (3, 0)
    assert stops_after(LlamaCpp(p_min=0.4, n_max=16), signals, limit=4) == (4, 4)
    assert stops_after(LlamaCpp(p_min=0.75), signals, limit=3) == (3, 2)
    assert stops_after(LlamaCpp(p_min=0.75), rows(confidence=[0.1])) == (1, 0)
    assert stops_after(LlamaCpp(n_max=2), signals) == (2, 2)


def test_llamacpp_drafts_nothing_where_no_draft_can_be_long_enough() -> None:
    """llama.cpp's server: "the max possible draft is too small", which is near the end of every budget."""
    policy = LlamaCpp(n_min=4, n_max=16)
    assert [policy.decide(Context(max_gamma=limit)).gamma for limit in (16, 4, 3, 1, 0)] == [16, 4, 0, 0, 0]


def test_sglang_by_hand() -> None:
    """Starts at 3 with e = 2. All accepted: e nears 3 from below and passes 2.5 at step 4, so it rises at step 15 (the
    first review after ten steps of warm-up), to 5 as e > 4.5 fails; rejections then take it down."""
    policy = SgLang()
    assert [step(policy, 99) for _ in range(15)] == [3] * 15
    slot = policy.slot("nf4")
    assert slot.average == pytest.approx(3 - 0.8**15)
    assert slot.gamma == 5
    assert [step(policy, 0) for _ in range(5)] == [5] * 5
    # e = (3 - .8^15) * .8^5 = .971 <= 3 - .75, and > 1 - .75: two tiers down would need e <= .25.
    assert slot.gamma == 3
    for _ in range(10):
        step(policy, 0)
    assert slot.gamma == 1


def test_ucbspec_by_hand() -> None:
    policy = UcbSpec(arms=(1, 4), delta=0.1)
    assert step(policy, 1) == 1
    assert step(policy, 2) == 4
    # t = 2, K = 2, L = 4, each arm once: bound = Y + 2 sqrt(2 (1 + 2 ln(2 * 4 * sqrt 2 / .1))).
    radius = 2 * math.sqrt(2 * (1 + 2 * math.log(8 * math.sqrt(2) / 0.1)))
    assert policy.bounds() == pytest.approx([2 + radius, 3 + radius])
    assert step(policy, 0) == 4
    radius_1 = 2 * math.sqrt(2 * (1 + 2 * math.log(18 * math.sqrt(2) / 0.1)))
    radius_2 = 2 * math.sqrt(3 / 4 * (1 + 2 * math.log(18 * math.sqrt(3) / 0.1)))
    assert policy.bounds() == pytest.approx([2 + radius_1, 2 + radius_2])
    assert step(policy, 0) == 1


def test_exp3spec_by_hand() -> None:
    policy = Exp3Spec(arms=(1, 4), seed=0)
    assert policy.pmf(Context()) == pytest.approx([0.5, 0.5])
    policy.learn(Decision(10, 4, propensity=0.5), result(4, 3))  # Y = 4: loss (5 - 4) / (4 * .5) = .5
    eta = math.sqrt(math.log(2) / (2 * 2))
    want = math.exp(-eta * 0.5)
    assert policy.pmf(Context()) == pytest.approx([1 / (1 + want), want / (1 + want)])
    policy.learn(Decision(11, 1, propensity=0.25), result(1, 0))  # Y = 1: loss 4 / (4 * .25) = 4
    eta = math.sqrt(math.log(2) / (3 * 2))
    a, b = math.exp(-eta * 4), math.exp(-eta * 0.5)
    assert policy.pmf(Context()) == pytest.approx([a / (a + b), b / (a + b)])


@pytest.mark.parametrize("name", ["ucbspec", "exp3spec"])
def test_banditspec_learns_nothing_from_a_gamma_that_was_cut(name: str) -> None:
    policy = make_policy(name)
    before = policy.state_dict()["sums"]
    step(policy, 1, limit=0)
    assert np.array_equal(policy.state_dict()["sums"], before)


def test_banditspec_in_seconds_prefers_short_drafts_where_they_are_dear() -> None:
    rng, policy = np.random.default_rng(0), UcbSpec(arms=(1, 8), objective="tokens_per_second")
    policy.set_costs("nf4", CostPrior(0.1, (0.1, 0.1)))
    for _ in range(2000):
        decision = policy.decide(Context(level="nf4"))
        k, n = decision.gamma, 0
        while n < k and rng.random() < 0.3:
            n += 1
        o = Outcome(k, n, min(n + 1, k), n + 1, 0.1 + 0.1 * k, 0.1 * k, 0.1, "nf4", 100, 0, np.zeros((k, 4)))
        policy.learn(decision, o)
    assert policy.sums[0, 0] > 3 * policy.sums[0, 1]


def test_vllm_prunes_by_the_confidences_of_the_step_before() -> None:
    """Flat costs but for the third token. sigmoid(.5 x - .2) of odds 9 to 1 is .711, of odds 1 to 9 .214."""
    policy = VllmAdaptive(gamma=3)
    policy.set_costs("nf4", CostPrior(0.0, (1.0, 1.0, 1.0, 1.5), weight=1e6))
    context = Context(level="nf4")
    sure, unsure = rows(confidence=[0.9] * 3), rows(confidence=[0.1] * 3)
    assert policy.probabilities(np.array([0.9, 0.1])) == pytest.approx([0.7106, 0.2144], abs=1e-4)
    found = []
    for signals in (unsure, sure, sure, unsure):
        decision = policy.decide(context)
        found.append(policy.submit(decision, Draft(3, signals[:3])))
    # All ones at first: (1, 2, 3, 4) / (1, 1, 1, 1.5). Then .214's: 1.26 tokens beat 1.27 / 1.5; then .711's twice.
    assert found == [2, 2, 2, 2]
    assert policy.submit(policy.decide(Context(level="nf4", max_gamma=1)), Draft(1, unsure[:1])) == 1
    policy.set_costs("nf4", CostPrior(0.0, (1.0, 1.5, 2.0, 2.5), weight=1e6))
    assert [policy.submit(policy.decide(context), Draft(3, s[:3])) for s in (sure, unsure, sure)] == [0, 1, 0]


def test_vllm_newton_step_by_hand() -> None:
    """One position, odds 1 to 1: sigmoid(-.2) = .4502; the bias moves by 100 / 150 of (80 - 45.02) / 24.75."""
    policy = VllmAdaptive(gamma=1)
    for i in range(100):
        policy.learn(Decision(i, 1), result(1, int(i < 80), rows(confidence=[0.5])))
    p = 1 / (1 + math.exp(0.2))
    assert policy.weights[1] == pytest.approx(-0.2 + 100 / 150 * (80 - 100 * p) / (100 * p * (1 - p) + 1e-3))
    assert policy.weights[0] == 0.5


def test_specdecpp_stops_at_its_threshold() -> None:
    """Untrained, the head believes the draft: .9 * .8 = .72 goes on, .72 * .9 = .648 risks more than .3."""
    signals = rows(confidence=[0.9, 0.8, 0.9, 0.9])
    assert stops_after(make_policy("specdecpp:acceptance=none"), signals) == (3, 3)
    assert stops_after(make_policy("specdecpp:acceptance=none"), rows(confidence=[0.1, 0.1, 0.1])) == (2, 2)
    assert stops_after(SpecDecPlusPlus(threshold=1.0), signals) == (16, 16)
    assert stops_after(SpecDecPlusPlus(threshold=0.0, least=0), signals) == (1, 1)


def test_specdecpp_says_which_weights_decided() -> None:
    policy = make_policy("specdecpp:acceptance=none")
    assert policy.decide(Context()).policy_version == 0
    for _ in range(16):
        policy.learn(policy.decide(Context()), result(4, 2))
    assert policy.decide(Context()).policy_version == policy.version == 1


@pytest.mark.parametrize("level", [(0.28, 0.1, 0.2), (1.0, 0.15, 0.4), (0.5, 0.3, 1.1)])
def test_linucb_goes_on_with_next_to_no_ridge(level: tuple[float, ...]) -> None:
    """What describes the level never varies at one: along it the ridge is all that there is beside the constant."""
    policy, rng = LinUcb(ridge=1e-6, discount=1.0, weights="none"), np.random.default_rng(0)
    x = np.column_stack([np.ones(4000), rng.random((4000, SIGNALS - 1)), np.full((4000, N_LEVEL), level)])
    for times in (2, 20, 200):
        delta = policy.take_delta()
        delta["linear.sums"][:, :DIM] = times * x.T @ x
        delta["linear.misc"][0] = delta["linear.count"][...] = 4000.0 * times
        policy.merge(delta)
    mean, deviation = policy._lines(np.append(x[0], np.zeros(len(policy.arms))), "nf4")
    assert np.isfinite(mean).all()
    assert (deviation < 0.1).all()


@pytest.mark.parametrize(
    "spec",
    [
        "hf-heuristic:0", "hf-confidence:1.5", "svip:-1", "adaedl:2", "leviathan:0", "llamacpp:2", "sglang:4",
        "llamacpp:n_min=5,n_max=3", "vllm-table:1/2", "vllm-table:2/3/1", "vllm-table:1/4/2/4/5/1",
        "vllm-table:1/2/99", "tensorrt-gate:0", "tensorrt-gate:threshold=2", "onnx-genai:0", "ik-autotune:17",
        "ik-autotune:n_min=7", "sglang:tiers=3/1", "ucbspec:delta=0", "exp3spec:arms=0/99", "vllm:0", "specdecpp:-1",
        "river:policy=bayes", "river:epsilon=0", "linucb:alpha=-1", "lints:ridge=0", 
        "nightjar:0", "nightjar:decay=0", "tapout:2", "tapout:cap=17",
        "exp3spec:arms=0", "ucbspec:arms=0", "linucb:ridge=1e-9", "online:cap=99", "online:acceptance=nowhere.npz",
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(spec: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(spec)
    assert str(caught.value).startswith(spec.split(":")[0])
    assert "\n" not in str(caught.value)
