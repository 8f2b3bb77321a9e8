"""The acceptance model and the stopping rule of `online`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.acceptance.features import rows
from policies.acceptance.mlp16 import level_code
from policies.acceptance.model import AFTER, AcceptanceModel
from policies.acceptance.step import Step
from policies.base import CONFIDENCE, ENTROPY, MARGIN, NGRAM, Context, Draft, Outcome, PolicyError
from policies.costs.cost_model import CostPrior
from policies.learned.online import FIRST, FORWARD, FREE, Online
from tests.support.tapes import make_tapes, play

LEVEL = "fp16"


def signals(rng: np.random.Generator, k: int) -> np.ndarray:
    found = np.zeros((k, 4))
    found[:, CONFIDENCE] = rng.random(k)
    found[:, ENTROPY] = 5 * (1 - found[:, CONFIDENCE])
    found[:, MARGIN] = 6 * found[:, CONFIDENCE]
    found[:, NGRAM] = rng.integers(-4, 5, k)
    return found


def described(acceptance_model: AcceptanceModel, outcome: Outcome) -> Step:
    step = Step(Context(), acceptance_model)
    step.extend(outcome.labelled, outcome)
    return step


def feed(acceptance_model: AcceptanceModel, steps: int, seed: int = 0) -> list[Outcome]:
    """Steps whose tokens are accepted with probability confidence squared."""
    rng, found = np.random.default_rng(seed), []
    for i in range(steps):
        k = int(rng.integers(1, 9))
        s = signals(rng, k)
        hits = rng.random(k) < s[:, CONFIDENCE] ** 2
        n = k if hits.all() else int(hits.argmin())
        outcome = Outcome(k, n, min(n + 1, k), n + 1, signals=s)
        acceptance_model.add(described(acceptance_model, outcome), outcome.labelled, outcome.accepted)
        found.append(outcome)
        if i % 16 == 15:
            acceptance_model.refresh()
    acceptance_model.refresh()
    return found


def test_learns_acceptance_to_within_a_batch_fit() -> None:
    """Close to the maximum-likelihood fit of the same rows, in log loss, though it sees each row once."""
    acceptance_model = AcceptanceModel("none", strength=50, discount=1.0)
    x, y = [], []
    for o in feed(acceptance_model, 1500):
        numbers = np.array([about for *_, about in described(acceptance_model, o).asked])
        units = acceptance_model.net.hidden(
            [LEVEL], np.zeros(len(numbers), int), numbers[:, 16:], 1 + np.arange(len(numbers))
        )
        x += list(np.hstack([rows(numbers)[1], units]))
        y += [float(j < o.accepted) for j in range(o.labelled)]
    phi, label, w = np.array(x), np.array(y), np.zeros(AFTER)
    for _ in range(30):
        p = 1 / (1 + np.exp(-phi @ w))
        w += np.linalg.solve((phi * (p * (1 - p))[:, None]).T @ phi + 1e-3 * np.eye(AFTER), phi.T @ (label - p))

    def loss(weights: np.ndarray) -> float:
        p = 1 / (1 + np.exp(-phi @ weights))
        return float(-(label * np.log(p) + (1 - label) * np.log(1 - p)).mean())

    _, after, (_, _, head) = acceptance_model.weights(LEVEL)
    assert loss(np.append(after, head)) < loss(w) + 0.005
    assert loss(np.append(after, head)) < 0.9 * loss(
        np.array([math.log(label.mean() / (1 - label.mean()))] + [0.0] * (AFTER - 1))
    )


def test_the_prior_is_the_draft_s_own_belief() -> None:
    step = Step(Context(acceptance=0.7), AcceptanceModel("none"))
    assert step.chance() == pytest.approx(1 / (1 + math.exp(-1.2)))
    step.extend(1, Draft(1, np.array([[1.0, 0.8, 2.0, 0.0]])))
    assert step.survival == [1.0, pytest.approx(0.8)]


def test_chances_are_those_of_the_features() -> None:
    """The decision leaves the zeros out; what is learnt from are the whole rows."""
    acceptance_model, rng, whole = AcceptanceModel(), np.random.default_rng(3), set()
    feed(acceptance_model, 200)
    before, after, (_, _, head) = acceptance_model.weights(LEVEL)
    memory: dict = {}
    for i in range(60):
        tokens = rng.integers(0, 3, 5).tolist()
        lagged = {"mean_confidence": rng.random(), "mean_entropy": 3 * rng.random(), "acceptance": rng.random()}
        context = Context(LEVEL, step=i, idle=i % 3, last_drafted=i % 2, last_accepted=1, tokens=tokens, memory=memory,
                          **lagged)  # fmt: skip
        drafts, lookups = rng.integers(0, 3, 10).tolist(), [0.0, 0.0, 0.7, *[0.0] * 8]
        step, table = Step(context, acceptance_model), signals(rng, 10)
        chances = []
        for k in range(10):
            chances.append(step.confidence or step.chance())
            step.extend(k + 1, Draft(k + 1, table[: k + 1], drafts[: k + 1], lookups[: k + 2]))
        numbers = np.array([about for *_, about in step.asked])
        read = numbers[:, 16:]
        own = [j for j in range(10) if j != 2]
        for n, at in enumerate(own, 1):  # what MLP16 reads are means and extremes of the tokens that took a forward
            entropy, confidence = table[own[:n], ENTROPY], table[own[:n], CONFIDENCE]
            told = [entropy.mean(), confidence.mean(), entropy.max(), confidence.min()]
            assert read[n - 1] == pytest.approx(told)
            assert numbers[n - 1, 15] == at
        units = acceptance_model.net.hidden([LEVEL], np.zeros(9, int), read, np.array(own) + 1)
        weights, code = acceptance_model.net.weights, level_code(LEVEL)
        whole_rows = np.column_stack([read, np.full(9, code), np.array(own) + 1.0])
        assert units == pytest.approx(weights.hidden(whole_rows))
        features = zip(*rows(numbers), units, strict=True)
        for j in range(10):
            ratio = step.survival[j + 1] / step.survival[j]
            if j == 2:
                assert (chances[j], ratio) == (0.7, pytest.approx(0.7))
                continue
            x, y, z = next(features)
            assert chances[j] == pytest.approx(1 / (1 + math.exp(-np.dot(before, x))))
            assert ratio == pytest.approx(1 / (1 + math.exp(-np.dot(after, y) - np.dot(head, z))))
            whole |= set(np.flatnonzero(x)) | {100 + n for n in np.flatnonzero(y)}
        acceptance_model.add(step, 10, int(rng.integers(10)))
    assert len(whole) == len(before) + len(after)  # every feature had its turn


def test_merging_adds_up() -> None:
    """Steps linearised at the same weights: merged sums are one process's to the last digits."""
    alone, learner, workers = (
        AcceptanceModel("none"),
        AcceptanceModel("none"),
        [AcceptanceModel("none") for _ in range(4)],
    )
    rng = np.random.default_rng(1)
    for i in range(40):
        s = signals(rng, 4)
        outcome = Outcome(4, 2, 3, 3, signals=s)
        for acceptance_model in (alone, workers[i // 10]):
            acceptance_model.add(described(acceptance_model, outcome), 3, 2)
    for worker in workers:
        learner.merge(worker.take_delta())
    alone.refresh()
    assert learner.weights(LEVEL)[1] == pytest.approx(alone.weights(LEVEL)[1], abs=1e-9)
    assert learner.weights(LEVEL)[2][2] == pytest.approx(alone.weights(LEVEL)[2][2], abs=1e-9)
    assert learner.weights(LEVEL)[0] == pytest.approx(alone.weights(LEVEL)[0], abs=1e-9)


def test_saved_priors_are_read_back(tmp_path: Path) -> None:
    acceptance_model = AcceptanceModel("none", discount=1.0)
    feed(acceptance_model, 600)
    acceptance_model.save_prior(tmp_path / "prior.npz")
    strong, weak = (
        AcceptanceModel(tmp_path / "prior.npz", strength=1e9),
        AcceptanceModel(tmp_path / "prior.npz", strength=10),
    )
    assert strong.weights(LEVEL)[1] == pytest.approx(acceptance_model.weights(LEVEL)[1])
    feed(strong, 50, seed=9)
    feed(weak, 50, seed=9)
    assert (
        np.abs(np.array(strong.weights(LEVEL)[1]) - acceptance_model.weights(LEVEL)[1]).max()
        < np.abs(np.array(weak.weights(LEVEL)[1]) - acceptance_model.weights(LEVEL)[1]).max()
    )
    np.savez(tmp_path / "bad.npz", before=np.zeros(3), after=np.zeros(AFTER))
    with pytest.raises(PolicyError, match="'before' has shape"):
        AcceptanceModel(tmp_path / "bad.npz")
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(PolicyError, match="no npz"):
        AcceptanceModel(tmp_path / "x.npz")


def test_one_step_rule_by_hand() -> None:
    """Costs that grow evenly: go on iff S p >= lambda (t_d + growth), at any k, however far one looks ahead."""
    policy = make(CostPrior(0.01, (0.1, 0.11)))
    rule, marginal = policy._rule("nf4"), policy.costs.level("nf4").rate * 0.02
    for k in range(16):
        for p in np.arange(1.0, 16.0) / 16.0:
            for near, pays in ((1.0 + 1e-9, True), (1.0 - 1e-9, False)):
                assert rule.pays(k, FORWARD, 1 << 62, p, near * marginal / p) == pays


def test_looking_ahead_past_a_step_in_the_costs() -> None:
    """Verifying two tokens costs 40 % more than one, nine no more than two: one alone would not pay, several do."""
    policy, p = make(CostPrior(0.001, (0.10, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14, 0.14))), 0.7
    rule, rate = policy._rule("nf4"), policy.costs.level("nf4").rate
    gains = [sum(p**i for i in range(1, m + 1)) for m in range(1, 17)]
    prices = [rate * (0.001 * m + 0.04) for m in range(1, 17)]
    least = min(c / g for c, g in zip(prices, gains, strict=True))
    assert least < 0.25 < prices[0] / gains[0]
    for near, pays in ((1.0 + 1e-9, True), (1.0 - 1e-9, False)):
        assert rule.pays(0, FORWARD, 1 << 62, p, near * least) == pays


def make(level_costs: CostPrior, **options: object) -> Online:
    policy = Online(acceptance="none", **options)  # type: ignore[arg-type]
    policy.set_costs("nf4", level_costs)
    return policy


def test_stops_where_survival_no_longer_pays() -> None:
    policy = make(CostPrior(0.01, (0.1, 0.11)))
    sure, unsure = [0.1, 0.97, 9.0, 3.0], [5.0, 0.03, 0.1, -3.0]
    table = np.array([sure, sure, unsure] + [sure] * 13)
    decision = policy.decide(Context(level="nf4", acceptance=0.8, step=1, last_drafted=1))
    assert decision.ask_per_token
    assert [policy.proceed(decision, Draft(k, table[:k])) for k in (1, 2, 3)] == [True, True, False]


def test_a_token_is_worth_what_the_latest_steps_and_this_one_take_for_one() -> None:
    """By hand, with free tokens of a lookup among those that take a forward: both answers, at every k."""
    policy, rng, answers = make(CostPrior(0.02, (0.1, 0.115), overhead_seconds=0.003)), np.random.default_rng(5), []
    costs = policy.costs.level("nf4")
    for _ in range(60):
        lookups = [0.0] * 6
        context = Context(level="nf4", acceptance=rng.random(), step=1, last_drafted=1)
        table = signals(rng, 6)
        table[:, CONFIDENCE] **= 0.2
        lookups[int(rng.integers(6))] = 0.8
        step: Step = policy.decide(replace(context, lookup_confidence=lookups[0])).features
        for k in range(5):
            free = lookups[: k + 1]
            step.extend(k, Draft(k, table[:k], (), free))
            p = free[k] or step.chance()
            forwards = free.count(0.0)
            seconds = 0.02 * forwards + costs.verify[k + 1] + 0.003
            rate = math.sqrt(costs.rate * (sum(step.survival) + step.survival[k] * p) / seconds)
            t_d = 0.0 if free[k] else 0.02
            pays = [
                step.survival[k] * sum(p**i for i in range(1, m + 1)) - rate * m * (t_d + 0.015)
                for m in range(1, 17 - k)
            ]
            assert policy._pays(k, step, 0.0) == (max(pays) >= 0.0)
            answers.append((k, max(pays) >= 0.0))
    assert len(set(answers)) == 10


def test_the_tail_is_submitted_only_where_a_wider_verify_pays() -> None:
    sure, unsure = [0.1, 0.97, 9.0, 3.0], [5.0, 0.02, 0.1, -3.0]
    table = np.array([sure, sure, unsure] + [sure] * 13)
    for growth, want in ((0.03, 2), (0.0, 3)):
        policy = make(CostPrior(0.001, (0.1, 0.1 + growth)))
        decision = policy.decide(Context(level="nf4", acceptance=0.9))
        assert policy.submit(decision, Draft(3, table[:3])) == want


def test_near_the_end_of_a_budget_by_hand() -> None:
    """Tokens past the end are worth nothing, and the last one a plain step; both answers, at every k."""
    policy, rng, answers = make(CostPrior(0.02, (0.1, 0.104, 0.13, 0.135))), np.random.default_rng(6), set()
    costs = policy.costs.level("nf4")
    costs.first = 0.004
    rule = policy._rule("nf4")
    for _ in range(300):
        left, kind = int(rng.integers(1, 17)), int(rng.integers(3))
        k, p, survival = int(rng.integers(left)), rng.random(), rng.random()
        t_d, first = (0.0 if kind == FREE else 0.02), (0.004 if kind == FIRST else 0.0)
        pays = []
        for m in range(1, left - k + 1):
            worth = [1.0] * (m - 1) + [costs.rate * costs.seconds[0] if k + m == left else 1.0]
            gain = survival * sum(p ** (i + 1) * w for i, w in enumerate(worth))
            pays.append(gain - costs.rate * (m * t_d + first + costs.verify[k + m] - costs.verify[k]))
        assert rule.pays(k, kind, left, p, survival) == (max(pays) >= 0.0)
        assert rule.worth(k, kind, left, p, survival) == pytest.approx(max(0.0, *pays))
        answers.add((kind, max(pays) >= 0.0))
    assert answers == {(kind, pays) for kind in (FORWARD, FIRST, FREE) for pays in (True, False)}


def test_the_token_that_ends_a_text_is_submitted_where_another_is_not() -> None:
    """Verifying a third draft takes more than a token is worth at this rate, but less than a step of its own."""
    table = np.array([[0.1, 0.97, 9.0, 3.0]] * 16)
    for remaining, want in ((1 << 62, 2), (5, 2), (4, 3)):
        policy = make(CostPrior(0.001, (0.1, 0.1, 0.1, 0.16)))
        costs = policy.costs.level("nf4")
        costs.rate *= 2.0  # steps give two tokens on average
        costs.price = costs.rate * costs.seconds
        decision = policy.decide(Context(level="nf4", acceptance=0.9, remaining=remaining, max_gamma=3))
        assert policy.submit(decision, Draft(3, table[:3])) == want


def test_wasted_drafting_is_timed() -> None:
    policy = make(CostPrior(0.01, (0.1, 0.2)))
    table = np.array([[5.0, 0.02, 0.1, -3.0]] * 16)
    for _ in range(40):
        decision = policy.decide(Context(level="nf4", acceptance=0.99, mean_confidence=0.99, step=1, last_drafted=1))
        decision.gamma = 4
        k = policy.submit(decision, Draft(4, table[:4]))
        assert k == 0
        policy.learn(decision, Outcome(0, 0, 0, 1, 0.18, 0.08, 0.1, "nf4", 100, forwards=4))
    assert policy.costs.level("nf4").draft == pytest.approx(0.02, rel=0.15)


def test_gamma_zero_where_drafting_is_dear_and_not_where_it_is_cheap() -> None:
    for t_d, zero in ((0.2, True), (0.001, False)):
        policy = make(CostPrior(t_d, (0.1, 0.1)))
        assert (policy.decide(Context(level="nf4")).gamma == 0) == zero


def test_beats_the_best_confidence_threshold_tuned_in_hindsight() -> None:
    from policies.baselines.engines.llamacpp import LlamaCpp

    tapes = make_tapes(61, 25)
    best = max(play(LlamaCpp(p_min=p, n_max=16), tapes, "nf4").goodput for p in (0.2, 0.3, 0.4, 0.5, 0.6))
    assert play(Online(acceptance="none"), tapes, "nf4").goodput > best
