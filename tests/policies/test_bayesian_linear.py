"""The Bayesian head: exact posteriors and exact merging; the labels of arms."""

from __future__ import annotations

import numpy as np
import pytest

from policies.base import ARMS, Outcome
from policies.estimators.arm_labels import ArmLabels
from policies.estimators.bayesian_linear import GaussianHead


def batches(count: int, seed: int = 0, d: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    rng, truth = np.random.default_rng(seed), np.random.default_rng(99).normal(size=d)
    rows = [rng.normal(size=(int(rng.integers(1, 8)), d)) for _ in range(count)]
    return [(phi, phi @ truth + 0.2 * rng.normal(size=len(phi))) for phi in rows]


def head(discount: float = 1.0) -> GaussianHead:
    rng = np.random.default_rng(1)
    root = rng.normal(size=(5, 5))
    return GaussianHead(rng.normal(size=5), root @ root.T + np.eye(5), discount)


@pytest.mark.parametrize("discount", [1.0, 0.97])
def test_posterior_is_the_textbook_one(discount: float) -> None:
    model, data = head(discount), batches(60)
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


def test_prior_before_data_and_truth_after() -> None:
    model = head()
    assert np.array_equal(model.mean, model.prior_mean)
    for phi, y in batches(800):
        model.add(phi, y)
    model.refresh()
    assert model.mean == pytest.approx(np.random.default_rng(99).normal(size=5), abs=0.05)


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


@pytest.mark.parametrize(
    ("k", "n", "want"),
    [
        (4, 2, {1: 1, 2: 1, 4: 0.5, 6: 2 / 6, 8: 0.25, 12: 2 / 12, 16: 0.125}),
        (4, 0, {1: 0, 2: 0, 4: 0, 6: 0, 8: 0, 12: 0, 16: 0}),
        (5, 3, {1: 1, 2: 1, 4: 0.75, 6: 0.5, 8: 0.375, 12: 0.25, 16: 3 / 16}),
    ],
)
def test_labels_by_hand(k: int, n: int, want: dict[int, float]) -> None:
    start, stop, y = ArmLabels(ARMS)(Outcome(k, n, min(n + 1, k), n + 1), 0.5)
    assert dict(zip(ARMS[start:stop], y[start:stop], strict=True)) == pytest.approx(want)


def test_labels_add_a_run_at_the_sequence_s_acceptance() -> None:
    assert ArmLabels(ARMS)(Outcome(4, 4, 4, 4), 0.5)[1] == ArmLabels(ARMS)(Outcome(6, 4, 4, 4), 0.5)[1] == 4
    start, stop, y = ArmLabels(ARMS)(Outcome(4, 4, 4, 5), 0.5)
    assert (start, stop) == (1, 8)
    assert y[4] == pytest.approx((4 + 0.5 + 0.25) / 6)
    assert y[7] == pytest.approx((4 + sum(0.5**i for i in range(1, 13))) / 16)


def test_an_accepted_end_of_sequence_says_nothing_of_longer_drafts() -> None:
    cut = Outcome(drafted=6, accepted=4, labelled=4, produced=4)
    start, stop, y = ArmLabels(ARMS)(cut, 0.5)
    assert (ARMS[start:stop], y[start:stop].tolist()) == ((1, 2, 4), [1, 1, 1])


def test_a_drafter_with_nothing_more_to_propose_labels_every_arm() -> None:
    for k in (0, 2):
        start, stop, y = ArmLabels(ARMS)(Outcome(k, k, k, k + 1, exhausted=True), 0.9)
        assert y[start:stop] == pytest.approx([min(k, gamma) / gamma for gamma in ARMS[1:]])
