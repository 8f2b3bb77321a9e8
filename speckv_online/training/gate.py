"""Fitting the hybrid drafter's gate to exact traces, and judging it on other prompts.

A trace holds the draft model's proposal and its signals at every position of the target's output; the n-gram lookup's
follow from the prompt and the output before the position. So both proposals are known wherever the target's own token
is, and nothing has to be decoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from speckv_online.errors import UserError
from speckv_online.lookup.gate import FEATURES, LOOKUP_FEATURES, Gate, gate_features
from speckv_online.lookup.ngram_index import NgramIndex
from speckv_online.traces.trace import Trace

#: Ridge of both logistic fits, on standardised features.
RIDGE = 1.0

#: Thresholds that :func:`tune_skip` tries, and the share of positions that not asking the model may cost.
SKIPS = tuple(round(0.3 + 0.05 * i, 2) for i in range(14))
TOLERANCE = 0.002


@dataclass(frozen=True)
class Positions:
    """Both proposals at every position of some traces; one row per output token.

    Attributes
    ----------
    features : ndarray, shape (n, 8)
        :data:`~speckv_online.lookup.gate.FEATURES`; zeros where the lookup has no proposal.
    found, model, lookup, differ : ndarray of bool, shape (n,)
        Whether the lookup has a proposal, each is right, and they propose different tokens.
    trace, prompt : ndarray of int, shape (n,)
        Number of the trace that a row is of, and of its prompt.
    """

    features: np.ndarray
    found: np.ndarray
    model: np.ndarray
    lookup: np.ndarray
    differ: np.ndarray
    trace: np.ndarray
    prompt: np.ndarray

    @property
    def decisive(self) -> np.ndarray:
        """Rows where the choice matters: the two differ and one of them is right."""
        return self.differ & (self.model | self.lookup)

    def select(self, rows: np.ndarray) -> Positions:
        """Return some of the rows."""
        return Positions(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def positions(traces: Sequence[Trace]) -> Positions:
    """Return both proposals at every position of traces of a draft model's drafts."""
    columns: list[list] = [[] for _ in Positions.__dataclass_fields__]
    prompts: dict[bytes, int] = {}
    for number, trace in enumerate(traces):
        if trace.meta.get("drafter", "model") != "model":
            raise UserError("a gate is fitted to traces of a draft model alone: collect them with --drafter model")
        prompt = prompts.setdefault(trace.prompt.tobytes(), len(prompts))
        index = NgramIndex(trace.prompt.tolist())
        for t, token in enumerate(trace.tokens.tolist()):
            found, modelled = index.propose(), int(trace.drafts[t, 0])
            features = [0.0] * len(FEATURES) if found is None else gate_features(found, trace.signals[t, 0])
            right = found is not None and found.token == token
            differ = found is not None and found.token != modelled
            row = (features, found is not None, modelled == token, right, differ, number, prompt)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            index.extend([token])
    return Positions(*map(np.array, columns))


def fit_gate(data: Positions) -> Gate:
    """Fit both logistic models by Newton's method; raises :class:`UserError` if the data cannot tell."""
    rows, found = data.decisive, data.found
    if len(set(data.lookup[rows].tolist())) < 2 or len(set(data.lookup[found].tolist())) < 2:
        raise UserError(
            f"{int(rows.sum())} decisive positions are too few to fit a gate: collect more traces of the draft model"
        )
    weights = _logistic(data.features[rows], data.lookup[rows])
    sure = _logistic(data.features[found][:, : len(LOOKUP_FEATURES)], data.lookup[found])
    return Gate(weights, sure)


def _logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the weights of a ridge-penalised logistic regression on raw features."""
    # Standardised but for the constant, so that one ridge fits all; the weights are given back on the raw scale.
    mean, scale = x.mean(0), x.std(0) + 1e-9
    mean[0], scale[0] = 0.0, 1.0
    z = (x - mean) / scale
    w = np.zeros(z.shape[1])
    penalty = RIDGE * np.eye(len(w))
    penalty[0, 0] = 1e-6
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-z @ w))
        step = np.linalg.solve((z * (p * (1 - p))[:, None]).T @ z + penalty, z.T @ (y - p) - penalty @ w)
        w += np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-9:
            break
    raw = w / scale
    raw[0] -= float(raw @ mean)
    return raw


def choose(gate: Gate, data: Positions, skip: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return, per row, whether the hybrid's proposal is right, and whether the model was asked."""
    skipped = (
        data.found & (lookup_confidences(gate, data) >= skip) if skip < 1.0 else np.zeros(len(data.found), dtype=bool)
    )
    prefers = skipped | data.differ & (data.features @ gate.weights > 0)
    return np.where(prefers, data.lookup, data.model), ~skipped


def lookup_confidences(gate: Gate, data: Positions) -> np.ndarray:
    """Return the probability that the lookup is right; it means nothing in rows without a proposal."""
    return 1.0 / (1.0 + np.exp(-data.features[:, : len(LOOKUP_FEATURES)] @ gate.sure_weights))


def cross_fit(data: Positions, skip: float = 1.0, folds: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Like :func:`choose`, with every prompt judged by a gate that was fitted to other prompts only."""
    right, asked = np.zeros(len(data.found), dtype=bool), np.ones(len(data.found), dtype=bool)
    for fold in range(folds):
        held = data.prompt % folds == fold
        if held.any():
            right[held], asked[held] = choose(fit_gate(data.select(~held)), data.select(held), skip)
    return right, asked


def tune_skip(data: Positions) -> float:
    """Return the lowest threshold that costs at most :data:`TOLERANCE` of the positions, by cross-validation."""
    always = cross_fit(data)[0].mean()
    return next((skip for skip in SKIPS if cross_fit(data, skip)[0].mean() >= always - TOLERANCE), 1.0)


def rates(data: Positions, right: np.ndarray, asked: np.ndarray) -> dict[str, float]:
    """Return the share of positions at which each way to draft is right, and how often the hybrid asks the model."""
    return {
        "model": float(data.model.mean()),
        "ngram": float(data.lookup.mean()),
        "ngram has a proposal": float(data.found.mean()),
        "better of the two (hindsight)": float((data.model | data.lookup).mean()),
        "hybrid": float(right.mean()),
        "model asked": float(asked.mean()),
    }


def prompts_of(traces: Iterable[Trace]) -> set[str]:
    """Return the ids of the traces' prompts."""
    return {t.prompt_id for t in traces}
