"""How well MLP16 predicts acceptance on what it has not seen: by split, with calibration and importances.

Splits hold out whole prompts, one task or one level (:mod:`speckv_online.training.splits`). ``step-mean`` features are
the publication's, which do not exist when gamma is chosen; ``causal`` ones do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from policies.acceptance.mlp16 import Weights
from speckv_online.evaluation.tables import INPUTS
from speckv_online.io.tables import Table
from speckv_online.training.estimators import ROWS, compare_estimators, error_and_correlation, require_sklearn
from speckv_online.training.mlp16 import Data, train_mlp16
from speckv_online.training.splits import held_out_splits

BINS = 10
#: Most rows that MLP16 is trained on for one held-out part.
TRAIN_ROWS = 30_000


@dataclass(frozen=True)
class HeldOut:
    """Predictions for held-out rows, and the weights that made them.

    Attributes
    ----------
    rows : ndarray of int, shape (M,)
        Which rows of the data.
    predicted, baseline : ndarray, shape (M,)
        MLP16's rates, and the training rows' mean rate per level and gamma.
    fits : list of (ndarray of bool, Weights)
        Held-out mask over all rows, and weights trained without them.
    """

    rows: np.ndarray
    predicted: np.ndarray
    baseline: np.ndarray
    fits: list[tuple[np.ndarray, Weights]]


def cross_fit(data: Data, epochs: int = 100, say: Callable[[str], object] = print) -> dict[str, HeldOut]:
    """Train MLP16 without each held-out part and predict that part, for every split of the data."""
    found = {}
    for name, masks in held_out_splits(data).items():
        say(f"training with {name} held out")
        rows, predicted, baseline, fits = [], [], [], []
        for out in masks:
            inside, outside = data[~out], data[out]
            # Schedules of one trace give near copies of each row, so a sample of many teaches as much as all.
            some = np.sort(np.random.default_rng(0).permutation(len(inside))[:TRAIN_ROWS])
            fit = train_mlp16(inside[some], seeds=(0,), epochs=epochs, batch=256 if len(some) > 10_000 else 128)
            w = fit.weights
            fits.append((out, Weights(w.W1, w.b1, w.W2, w.b2, w.phi_cov, fit.noise_var)))
            rows.append(np.flatnonzero(out))
            predicted.append(w.predict(outside.x))
            baseline.append(mean_rates(inside, outside))
        found[name] = HeldOut(np.concatenate(rows), np.concatenate(predicted), np.concatenate(baseline), fits)
    return found


def mean_rates(inside: Data, outside: Data) -> np.ndarray:
    """Return, for each row of ``outside``, the mean rate of its level and gamma in ``inside``; else of its gamma."""
    rates = np.full(len(outside), inside.y.mean())
    for gamma in np.unique(outside.x[:, -1]):
        same, rows = inside.x[:, -1] == gamma, outside.x[:, -1] == gamma
        if same.any():
            rates[rows] = inside.y[same].mean()
        for level in np.unique(outside.level[rows]):
            if (both := same & (inside.level == level)).any():
                rates[rows & (outside.level == level)] = inside.y[both].mean()
    return rates


def brier(predicted: np.ndarray, y: np.ndarray, drafted: np.ndarray) -> float:
    """Brier score per drafted token: the rate as the forecast that a token of the draft is accepted.

    A step with rate y of k tokens has k y accepted and k (1 - y) others, those after the first rejection included.
    """
    each = y * (1 - predicted) ** 2 + (1 - y) * predicted**2
    return float(np.average(each, weights=drafted))


def reliability(predicted: np.ndarray, y: np.ndarray, drafted: np.ndarray) -> list[tuple[float, float, int]]:
    """Return (mean predicted, observed rate, steps) in bins of equal width, both weighted by drafted tokens."""
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    groups = [bins == b for b in range(BINS) if (bins == b).any()]
    mean = np.average
    return [
        (float(mean(predicted[g], weights=drafted[g])), float(mean(y[g], weights=drafted[g])), int(g.sum()))
        for g in groups
    ]


def prediction_tables(data: Mapping[str, Data], fits: Mapping[str, Mapping[str, HeldOut]]) -> list[Table]:
    """Score predictions of each set of features: error, correlation, Brier score and calibration error by split."""
    scores = Table(
        "predictions",
        "MLP16 on held-out prompts, tasks and levels (Brier score per drafted token; calibration error by rows)",
        ("features", "held out", "rows", "correlation", "MSE", "MSE of mean rate", "Brier", "calibration error"),
    )
    curve = Table(
        "reliability",
        "Reliability on held-out prompts: predicted against observed acceptance",
        ("features", "predicted", "observed", "rows"),
    )
    for features, d in data.items():
        for split, held in fits[features].items():
            y, k = d.y[held.rows], d.x[held.rows, -1]
            mse, correlation = error_and_correlation(held.predicted, y)
            bins = reliability(held.predicted, y, k)
            weight = np.array([n for *_, n in bins])
            gap = float(np.average([abs(p - o) for p, o, _ in bins], weights=weight))
            plain = float(np.mean((held.baseline - y) ** 2))
            score = brier(held.predicted, y, k)
            scores.add(features, split, len(y), correlation, mse, plain, score, gap)
            if split == "prompts":
                for row in bins:
                    curve.add(features, *row)
    return [scores, curve]


def importance_table(
    data: Mapping[str, Data], fits: Mapping[str, Mapping[str, HeldOut]], seed: int = 0, repeats: int = 5
) -> Table:
    """Gini importance of a random forest for rate > 0.5 (as published), and permutation importance of MLP16.

    The permutation importance is how much the mean squared error on held-out prompts rises when one input is shuffled
    among them (Breiman 2001; mean of several shuffles). Gini importance is computed on the rows it was fitted to.
    """
    require_sklearn()
    from sklearn.ensemble import RandomForestClassifier

    title = "Importance of inputs: Gini, and rise of the MSE when permuted"
    table = Table("importance", title, ("features", "input", "Gini", "permutation"), digits=4)
    for features, d in data.items():
        rng = np.random.default_rng(seed)
        some = rng.permutation(len(d))[:ROWS]
        label = d.y[some] > 0.5
        gini = RandomForestClassifier(100, random_state=42).fit(d.x[some], label).feature_importances_
        for i, name in enumerate(INPUTS):
            rises = []
            for out, weights in fits[features]["prompts"].fits:
                x, y = d.x[out], d.y[out]
                before = np.mean((weights.predict(x) - y) ** 2)
                for _ in range(repeats):
                    shuffled = x.copy()
                    shuffled[:, i] = rng.permutation(x[:, i])
                    rises.append(np.mean((weights.predict(shuffled) - y) ** 2) - before)
            table.add(features, name, float(gini[i]), float(np.mean(rises)))
    return table


def estimator_table(data: Data, gammas: tuple[int, ...], seed: int = 0) -> Table:
    """Compare the publication's estimators with one fold of prompts held out."""
    out = held_out_splits(data)["prompts"][0]
    rng = np.random.default_rng(seed)
    train = rng.permutation(np.flatnonzero(~out))[:ROWS]
    test = np.flatnonzero(out)
    scores = compare_estimators((data.x[train], data.y[train]), (data.x[test], data.y[test]), gammas)
    table = Table(
        "estimators",
        "Estimators with causal features, one fifth of the prompts held out (ms measured on this machine)",
        ("model", "MSE", "correlation", "ms per decision"),
        digits=4,
    )
    for s in scores:
        table.add(s.model, s.mse, s.correlation, s.milliseconds)
    return table
