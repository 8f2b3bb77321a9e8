"""The Bayesian head and the `online` policy: exact posteriors, exact merging, labels, learning."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import ARMS, Context, Decision, Outcome, PolicyError
from policies.costs.cost_model import CostPrior
from policies.estimators.arm_labels import MODES, ArmLabels, Mode
from policies.estimators.bayesian_linear import GaussianHead
from policies.learned.online import Online
from policies.registry import make_policy
from tests.support.tapes import COSTS, make_tapes, play, trained


def batches(count: int, seed: int = 0, d: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    rng, truth = np.random.default_rng(seed), np.random.default_rng(99).normal(size=d)
    rows = [rng.normal(size=(int(rng.integers(1, 8)), d)) for _ in range(count)]
    return [(phi, phi @ truth + 0.2 * rng.normal(size=len(phi))) for phi in rows]


def head(discount: float = 1.0, noise: float = 0.0) -> GaussianHead:
    rng = np.random.default_rng(1)
    root = rng.normal(size=(5, 5))
    return GaussianHead(rng.normal(size=5), root @ root.T + np.eye(5), discount, noise)


@pytest.mark.parametrize("discount", [1.0, 0.97])
def test_posterior_is_the_textbook_one(discount: float) -> None:
    model, data = head(discount, noise=0.04), batches(60)
    A0, m0 = model.prior_precision.copy(), model.prior_mean.copy()
    A, b = A0.copy(), A0 @ m0
    for i, (phi, y) in enumerate(data):
        model.add(phi, y)
        A = discount * A + phi.T @ phi + (1 - discount) * A0
        b = discount * b + phi.T @ y + (1 - discount) * (A0 @ m0)
        if i % 7 == 0:
            model.refresh()
    model.refresh()
    assert model.mean == pytest.approx(np.linalg.solve(A, b), abs=1e-9)
    assert model.factor.T @ model.factor == pytest.approx(0.04 * np.linalg.inv(A), abs=1e-12)


def test_prior_before_data_and_noise_after() -> None:
    model = head()
    assert np.array_equal(model.mean, model.prior_mean)
    for phi, y in batches(800):
        model.add(phi, y)
    model.refresh()
    rows_per_step = np.mean([len(y) for _, y in batches(800)])
    assert model.noise / rows_per_step == pytest.approx(0.04, rel=0.15)
    assert model.mean == pytest.approx(np.random.default_rng(99).normal(size=5), abs=0.05)


def test_samples_have_the_posterior_moments() -> None:
    model = head(noise=0.5)
    for phi, y in batches(10):
        model.add(phi, y)
    model.refresh()
    draws = model.sample(np.random.default_rng(3), 20_000, scale=2.0)
    assert draws.mean(axis=0) == pytest.approx(model.mean, abs=0.02)
    assert np.cov(draws.T) == pytest.approx(4 * model.factor.T @ model.factor, abs=0.02)


@pytest.mark.parametrize("discount", [1.0, 0.99])
@pytest.mark.parametrize("every", [1, 7, 40])
def test_merged_statistics_equal_one_process(discount: float, every: int) -> None:
    data = batches(160)
    alone, learner, workers = head(discount), head(discount), [head(discount) for _ in range(8)]
    for start in range(0, 160, every):
        worker = workers[start // every % 8]
        for phi, y in data[start : start + every]:
            alone.add(phi, y)
            worker.add(phi, y)
        learner.merge(worker.take_delta())
    alone.refresh()
    assert learner.mean == pytest.approx(alone.mean, abs=1e-9)
    assert learner.factor == pytest.approx(alone.factor, abs=1e-9)
    assert learner.noise == pytest.approx(alone.noise, abs=1e-9)


def learnt(policy: Online, steps: int, seed: int = 0, level: str = "nf4") -> list[tuple[Decision, Outcome]]:
    """Random steps, learnt by the policy and returned."""
    rng, done = np.random.default_rng(seed), []
    for i in range(steps):
        c = Context(level=level, step=i, last_drafted=1, acceptance=float(rng.random()))
        c.mean_entropy, c.mean_confidence = float(rng.uniform(0, 5)), float(rng.random())
        c.max_entropy, c.min_confidence = c.mean_entropy + 1, c.mean_confidence / 2
        decision = policy.decide(c)
        k = int(rng.choice(ARMS))
        n = int(rng.integers(0, k + 1))
        outcome = Outcome(k, n, min(n + 1, k), n + 1, 0.1 + 0.01 * k, 0.01 * k, 0.1, level, 100)
        policy.learn(decision, outcome)
        done.append((decision, outcome))
    return done


def make(**options: object) -> Online:
    return Online(weights=trained(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("explore", ["thompson", "ucb", "greedy"])
def test_workers_and_learner_end_as_one_policy(explore: str) -> None:
    alone, learner = make(explore=explore), make(explore=explore, seed=5)
    workers = [make(explore=explore, seed=i, worker=i + 1) for i in range(8)]
    for i in range(8):
        for decision, outcome in learnt(workers[i], 40, seed=i):
            alone.learn(decision, outcome)
        learner.merge(workers[i].take_delta())
    alone._refresh()
    assert learner.head.mean == pytest.approx(alone.head.mean, abs=1e-9)
    assert learner.head.factor == pytest.approx(alone.head.factor, abs=1e-9)
    workers[0].load_state_dict(learner.state_dict())
    assert workers[0].head.mean == pytest.approx(alone.head.mean, abs=1e-9)


def test_a_loaded_state_brings_its_prices() -> None:
    policy, other = make(), make()
    for p, t_d in ((policy, 0.01), (other, 0.1)):
        p.set_costs("nf4", CostPrior(t_d, (0.1, 0.1)))
    policy._price("nf4")
    policy.load_state_dict(other.state_dict())
    assert policy._price("nf4")[0] == pytest.approx(other._price("nf4")[0])


@pytest.mark.parametrize(
    ("k", "n", "mode", "want"),
    [
        (4, 2, "one_sided", {1: 1, 2: 1, 4: 0.5, 6: 2 / 6, 8: 0.25, 12: 2 / 12, 16: 0.125}),
        (4, 2, "played", {1: 1, 2: 1, 4: 0.5}),
        (4, 2, "imputed", {1: 1, 2: 1, 4: 0.5, 6: 2 / 6, 8: 0.25, 12: 2 / 12, 16: 0.125}),
        (4, 4, "one_sided", {1: 1, 2: 1, 4: 1}),
        (4, 4, "played", {1: 1, 2: 1, 4: 1}),
        (4, 0, "one_sided", {1: 0, 2: 0, 4: 0, 6: 0, 8: 0, 12: 0, 16: 0}),
        (5, 3, "played", {1: 1, 2: 1, 4: 0.75}),
    ],
)
def test_labels_by_hand(k: int, n: int, mode: Mode, want: dict[int, float]) -> None:
    start, stop, y = ArmLabels(ARMS, mode)(Outcome(k, n, min(n + 1, k), n + 1), 0.5)
    assert dict(zip(ARMS[start:stop], y[start:stop], strict=True)) == pytest.approx(want)


def test_imputed_labels_add_a_run_at_the_sequence_s_acceptance() -> None:
    assert ArmLabels(ARMS)(Outcome(4, 4, 4, 4), 0.5)[1] == ArmLabels(ARMS)(Outcome(6, 4, 4, 4), 0.5)[1] == 4
    start, stop, y = ArmLabels(ARMS)(Outcome(4, 4, 4, 5), 0.5)
    assert (start, stop) == (1, 8)
    assert y[4] == pytest.approx((4 + 0.5 + 0.25) / 6)
    assert y[7] == pytest.approx((4 + sum(0.5**i for i in range(1, 13))) / 16)


def test_an_accepted_end_of_sequence_says_nothing_of_longer_drafts() -> None:
    cut = Outcome(drafted=6, accepted=4, labelled=4, produced=4)
    for mode in MODES:
        start, stop, y = ArmLabels(ARMS, mode)(cut, 0.5)
        assert (ARMS[start:stop], y[start:stop].tolist()) == ((1, 2, 4), [1, 1, 1])


def test_a_drafter_with_nothing_more_to_propose_labels_every_arm() -> None:
    for k in (0, 2):
        start, stop, y = ArmLabels(ARMS)(Outcome(k, k, k, k + 1, exhausted=True), 0.9)
        assert y[start:stop] == pytest.approx([min(k, gamma) / gamma for gamma in ARMS[1:]])


def test_learning_is_idempotent_and_order_free() -> None:
    teacher, a, b = make(), make(seed=1), make(seed=2)
    steps = learnt(teacher, 50)
    for decision, outcome in steps:
        a.learn(decision, outcome)
    for decision, outcome in [*reversed(steps), *steps]:
        b.learn(decision, outcome)
    a._refresh()
    b._refresh()
    assert a.head.mean == pytest.approx(b.head.mean, abs=1e-9)
    assert a.head.state()["head.misc"] == pytest.approx(b.head.state()["head.misc"], abs=1e-9)


def test_state_survives_a_save(tmp_path: object) -> None:
    policy, again = make(seed=3), make(seed=3)
    learnt(policy, 100)
    path = f"{tmp_path}/state.npz"
    np.savez(path, **policy.state_dict())
    with np.load(path, allow_pickle=False) as file:
        again.load_state_dict(dict(file))
    policy._refresh()
    assert again.head.mean == pytest.approx(policy.head.mean, abs=1e-12)
    assert again.costs.level("nf4").seconds == pytest.approx(policy.costs.level("nf4").seconds)


def test_foreign_states_are_refused() -> None:
    state = make().state_dict()
    with pytest.raises(PolicyError, match=r"lacks 'online\.format'"):
        make().load_state_dict({})
    with pytest.raises(PolicyError, match="another version"):
        make().load_state_dict(state | {"online.format": np.array(99)})
    with pytest.raises(PolicyError, match="shape"):
        make().load_state_dict(state | {"head.sums": np.zeros((3, 4))})
    with pytest.raises(PolicyError, match="finite"):
        make().load_state_dict(state | {"head.misc": np.full(3, np.nan)})


def test_propensities_are_the_pmf_s() -> None:
    policy = make(strength=5.0, explore="thompson:3")
    for level in ("fp16", "nf4"):
        policy.set_costs(level, CostPrior(*COSTS[level][:1], (COSTS[level][1], COSTS[level][1] + COSTS[level][2])))
    seen = set()
    for limit in (16, 16, 16, 5, 3, 0) * 5:
        context = Context(level="nf4", step=1, last_drafted=1, max_gamma=limit)
        pmf = policy.pmf(context)
        assert pmf.sum() == pytest.approx(1)
        decision = policy.decide(context)
        assert decision.propensity == pytest.approx(pmf[ARMS.index(decision.gamma)])
        seen.add(decision.gamma)
    assert len(seen) > 2


def test_thompson_plays_arms_as_often_as_its_pmf_says() -> None:
    policy = make(strength=5.0, explore="thompson:3")
    context = Context(level="nf4", step=1, last_drafted=1)
    pmf = policy.pmf(context)
    gammas = [policy.decide(context).gamma for _ in range(4000)]
    shares = np.array([gammas.count(g) for g in ARMS]) / 4000
    assert np.abs(shares - pmf).max() < 0.03


@pytest.mark.parametrize(
    "bad", ["strength=0", "discount=1.5", "refresh=0", "explore=magic", "explore=ucb:x", "labels=no"]
)
def test_bad_options_are_refused(bad: str) -> None:
    with pytest.raises(PolicyError, match=bad.split("=")[0]):
        make_policy(f"online:{bad}", weights=trained())


def test_wrong_pretrained_beliefs_are_overcome() -> None:
    """Warm-started from weights that promise nothing, the policy finds out that drafting pays."""
    w = trained()
    gloomy = type(w)(w.W1, w.b1, np.zeros_like(w.W2), np.array([0.02]), w.phi_cov)
    tapes = make_tapes(21, 40, ease=1.0)
    frozen, policy = make_policy("mlp16", weights=gloomy), make_policy("online:strength=50,seed=1", weights=gloomy)
    assert play(policy, tapes, "int8").goodput > 1.2 * play(frozen, tapes, "int8").goodput
