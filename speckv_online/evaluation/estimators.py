"""The publication's candidate predictors as scikit-learn builds them, for comparison with MLP16.

They read the same six inputs and predict the acceptance rate. scikit-learn is an optional part: ``[paper]``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speckv_online.errors import UserError

#: Predictions timed per decision cost, after as many to warm up.
DECISIONS = 10


@dataclass(frozen=True)
class Score:
    """How one predictor did on rows that it was not fitted to.

    Attributes
    ----------
    mse, correlation : float
        Of predictions clipped to [0, 1]; the correlation is NaN where one side is constant.
    milliseconds : float
        Measured median time of one decision: one prediction per gamma, made one by one as published.
    """

    model: str
    mse: float
    correlation: float
    milliseconds: float


def require_sklearn() -> None:
    """Raise :class:`UserError` if scikit-learn is not installed."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError("this needs scikit-learn: pip install 'speckv-online[paper]'") from None


def estimators() -> dict[str, Callable[[], Any]]:
    """Return makers of the publication's predictors, with its settings and seeds."""
    require_sklearn()
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.linear_model import Ridge
    from sklearn.neural_network import MLPRegressor

    return {
        "Ridge": lambda: Ridge(alpha=1.0),
        "MLP-16": lambda: MLPRegressor(hidden_layer_sizes=(16,), max_iter=500, random_state=42),
        "MLP-32": lambda: MLPRegressor(hidden_layer_sizes=(32,), max_iter=500, random_state=42),
        "RF-10": lambda: RandomForestRegressor(n_estimators=10, max_depth=8, random_state=42),
        "RF-100": lambda: RandomForestRegressor(n_estimators=100, random_state=42),
    }


def fit_quietly(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """Fit a scikit-learn model; that it stopped before it converged is part of the publication, not news."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)


def compare_estimators(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], gammas: Sequence[int]
) -> list[Score]:
    """Fit all of :func:`estimators` to ``train`` and score them on ``test``: each inputs (N, 6) and rates (N,)."""
    scores = []
    for name, make in estimators().items():
        model = fit_quietly(make(), *train)
        rate = np.clip(model.predict(test[0]), 0.0, 1.0)
        scores.append(Score(name, *error_and_correlation(rate, test[1]), decision_time(model, test[0][:1], gammas)))
    return scores


def error_and_correlation(predicted: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return mean squared error and Pearson correlation, NaN where one side is constant."""
    related = len(y) > 1 and float(np.std(predicted)) > 0 and float(np.std(y)) > 0
    correlation = float(np.corrcoef(predicted, y)[0, 1]) if related else float("nan")
    return float(np.mean((predicted - y) ** 2)), correlation


def decision_time(model: Any, row: np.ndarray, gammas: Sequence[int]) -> float:
    """Return the median milliseconds of one decision: a prediction of ``row`` (1, 6) for each gamma in turn."""
    times = []
    for _ in range(2 * DECISIONS):
        start = time.perf_counter()
        for gamma in gammas:
            sample = row.copy()
            sample[0, -1] = gamma
            model.predict(sample)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times[DECISIONS:]))
