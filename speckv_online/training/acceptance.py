"""Training the acceptance weights that token-level policies start from: logistic regressions over drafted tokens.

Two heads, as :mod:`policies.acceptance.model` defines them: ``before`` predicts the acceptance of the next token from
what is known before it is drafted, ``after`` knows its own signals too. Rows are the tested tokens of every step start
(those before the first rejection, and the rejected one), over replays of exact traces under several schedules of gamma.
The table of token histories is filled from the same rows; a prompt's own drafts are left out of the table that its rows
see, as those of a new prompt will not be in the table that ships.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from policies.acceptance.context_table import SHAPE, SHRINK_PAIR, SHRINK_SINGLE, SINGLES
from policies.acceptance.draft_quality import quality
from policies.acceptance.features import rows
from policies.acceptance.mlp16 import StepNet, Weights, resolve_weights
from policies.acceptance.model import HEADS, AcceptanceModel, prior_means
from policies.acceptance.step import Step
from policies.base import Context, Decision, Draft, Outcome
from speckv_online.errors import UserError
from speckv_online.traces.trace import Trace
from speckv_online.training.schedules import Schedule, replay_untimed, schedule_gammas

#: Prior weight of a head's coefficients, in tokens: keeps what the data does not know near the untrained head.
RIDGE = 1.0
COLUMNS = ("before", "after", "rate", "y", "prompt", "buckets", "group")
#: What MLP16's predicted rate counts in log-odds. The token's own signals tell more than it does: with a weight of 1
#: the log loss is what it is without, and each 1 more costs 0.001 nats.
MLP16_WEIGHT = 1.0
#: Most rows of one pair and level that weights are fitted to: a pair with more text should not drown the others.
ROWS = 100_000


def draft_of(trace: Trace) -> str:
    """Return what tells a trace's draft from others; empty where the trace does not say."""
    return str(trace.meta.get("draft_fingerprint", ""))


class _Starts(Schedule):
    """A schedule that describes, at each step's start, all tokens that a long draft would have tested."""

    def __init__(self, gammas: Sequence[int], *, seed: int = 0) -> None:
        super().__init__(gammas, seed=seed)
        self.acceptance_model = AcceptanceModel("none")  # what it predicts plays no part
        self.tokens = _Rows()

    def decide(self, context: Context) -> Decision:
        trace, t = self.trace, context.position
        accepted = int(trace.accepted[t])
        # What the budget would have cut off is no label, and nothing follows an accepted end or what a lookup knows.
        labelled = min(accepted + 1, int(trace.available[t]), trace.budget - t - 1, len(trace) - t)
        step = Step(context, self.acceptance_model)
        lookups = () if trace.lookups is None else trace.lookups[t].tolist()
        step.extend(labelled, Draft(labelled, trace.signals[t], trace.drafts[t].tolist(), lookups))
        self.tokens.add(step, labelled, accepted, trace.prompt_id, (draft_of(trace), trace.level))
        decision = super().decide(context)
        decision.features = step
        return decision

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        decision.features.note(outcome.labelled, outcome.accepted)

    def run(self, trace: Trace) -> None:
        """Replay one trace."""
        self.trace = trace
        replay_untimed(trace, self)


class _Rows:
    """Rows that are being collected."""

    def __init__(self) -> None:
        self.numbers: list[tuple[float, ...]] = []
        self.y: list[bool] = []
        self.prompt: list[str] = []
        self.buckets: list[tuple[int, int]] = []
        self.group: list[tuple[str, str]] = []

    def add(self, step: Step, labelled: int, accepted: int, prompt: str, group: tuple[str, str]) -> None:
        # A lookup's proposals have no rows: how sure the drafter is of them is all that a policy goes by.
        for j, where, _, about in step.asked:
            if j < labelled:
                self.numbers.append(about)
                self.y.append(j < accepted)
                self.prompt.append(prompt)
                self.buckets.append(where[1:])
                self.group.append(group)


@dataclass(frozen=True)
class Tokens:
    """Rows to train on: features (N, 16) and (N, 16) of the heads, the acceptance rate that MLP16 predicts of the
    step's tokens up to each (N,), labels (N,), the prompts that they come from (N,), the buckets (N, 2) of the table of
    token histories that they belong to, and draft and level (N, 2)."""

    before: np.ndarray
    after: np.ndarray
    rate: np.ndarray
    y: np.ndarray
    prompt: np.ndarray
    buckets: np.ndarray
    group: np.ndarray
    #: What a row counts in the table: several schedules give near copies of each.
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, mask: np.ndarray) -> Tokens:
        return replace(self, **{name: getattr(self, name)[mask] for name in COLUMNS})

    def quality(self) -> np.ndarray:
        """Each row's draft quality m, of its draft at its level, shape (N,)."""
        found = np.zeros(len(self))
        for mine in self.groups():
            found[mine] = quality(self.weight * float(self.y[mine].sum()), self.weight * len(mine))
        return found

    def groups(self) -> list[np.ndarray]:
        """Return the rows of each draft and level."""
        _, at = np.unique(self.group, axis=0, return_inverse=True)
        return [np.flatnonzero(at == i) for i in range(at.max() + 1)]

    def counts(self) -> np.ndarray:
        """Tested and accepted drafts per bucket, see :class:`policies.acceptance.context_table.TokenHistory`."""
        found = np.zeros(SHAPE)
        for index in self.buckets.T:
            known = index >= 0
            np.add.at(found[0], index[known], self.weight)
            np.add.at(found[1], index[known], self.weight * self.y[known])
        return found

    def with_history(self, table: np.ndarray, own: str | None = None) -> Tokens:
        """Return the rows with what the table knows of their tokens.

        Where ``own`` names the draft that the table is of, the rows' own prompts are left out of it.
        """
        before, known = self.before.copy(), self.buckets
        before[:, -2:] = excess(table, known)
        inside = self.group[:, 0] == own if own is not None else np.zeros(len(self), dtype=bool)
        for prompt in np.unique(self.prompt[inside]):
            mine = (self.prompt == prompt) & inside
            before[mine, -2:] = excess(np.maximum(table - self[mine].counts(), 0.0), known[mine])
        return replace(self, before=before)


def excess(table: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """Return the last two features of :meth:`policies.acceptance.context_table.TokenHistory.look` for buckets (N,
    2)."""
    labelled, accepted = table[0][buckets], table[1][buckets]
    mean = table[1, :SINGLES].sum() / max(table[0, :SINGLES].sum(), 1e-9)
    shrunk = (accepted - mean * labelled) / (labelled + np.array([SHRINK_SINGLE, SHRINK_PAIR]))
    return np.where(buckets >= 0, shrunk, 0.0)


def tokens_from_traces(traces: Iterable[Trace], seed: int = 0, weights: str | Path | Weights = "") -> Tokens:
    """Make one row per tested token of every step start; the columns of the table are left at zero.

    ``weights`` are MLP16's, the shipped ones by default.
    """
    schedules = [_Starts(gammas, seed=seed + i) for i, gammas in enumerate(schedule_gammas().values())]
    positions: dict[str, int] = {}
    for trace in traces:
        positions[draft_of(trace)] = positions.get(draft_of(trace), 0) + len(trace)
        for schedule in schedules:
            schedule.run(trace)
    found = [schedule.tokens for schedule in schedules]
    names = ("numbers", *COLUMNS[3:])
    numbers, y, prompt, index, group = (np.array([v for own in found for v in getattr(own, name)]) for name in names)
    if not len(y):
        raise UserError("the traces hold no tested token of a draft model to train on: profile with more new tokens")
    before, after = rows(numbers)
    net = StepNet(resolve_weights(weights))
    levels, at = np.unique(group[:, 1], return_inverse=True)
    units = net.hidden(levels.tolist(), at, numbers[:, 16:], numbers[:, 15].astype(int) + 1)
    rate = units @ net.weights.W2[:, 0] + net.weights.b2[0]
    # In one replay each position is tested about once. The table is of the first pair.
    weight = positions[str(group[0, 0])] / int((group[:, 0] == group[0, 0]).sum())
    return Tokens(before, after, rate, y.astype(float), prompt, index, group, min(1.0, weight))


def fit_logistic(
    x: np.ndarray, y: np.ndarray, prior: np.ndarray, ridge: float = RIDGE, offset: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression by Newton's method.

    Parameters
    ----------
    x : ndarray, shape (N, D)
    y : ndarray, shape (N,)
        Labels, 0 or 1.
    prior : ndarray, shape (D,)
        Where the ridge penalty pulls the coefficients to.
    ridge : float
    offset : ndarray, shape (N,), or float
        What is added to the log-odds.

    Returns
    -------
    weights : ndarray, shape (D,)
    precision : ndarray, shape (D, D)
        Information of the data, sum of p (1 - p) x x^T.
    """
    weights, penalty = prior.copy(), ridge * np.eye(len(prior))

    def loss(w: np.ndarray) -> float:
        eta = x @ w + offset
        return float(np.logaddexp(0.0, eta).sum() - y @ eta + 0.5 * ridge * np.square(w - prior).sum())

    current = loss(weights)
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights + offset, -30.0, 30.0)))
        information = (x * (p * (1.0 - p))[:, None]).T @ x
        step = np.linalg.solve(information + penalty, x.T @ (y - p) - ridge * (weights - prior))
        # Newton can overshoot far from the optimum: halve the step until the loss falls.
        scale = 1.0
        while loss(weights + scale * step) > current and scale > 1e-6:
            scale /= 2
        weights = weights + scale * step
        previous, current = current, loss(weights)
        if previous - current <= 1e-9 * abs(previous):
            break
    p = 1.0 / (1.0 + np.exp(-np.clip(x @ weights + offset, -30.0, 30.0)))
    return weights, (x * (p * (1.0 - p))[:, None]).T @ x


def lines(x: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Features (N, 2 D + 1) of weights that are lines over draft quality m (N,): x, m x, m^2."""
    return np.hstack([x, m[:, None] * x, np.square(m)[:, None]])


def train_acceptance(tokens: Tokens, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays of a file of acceptance weights, see :class:`policies.acceptance.model.AcceptanceModel`."""
    own = str(tokens.group[0, 0])
    table = tokens[tokens.group[:, 0] == own].counts()
    rng, m = np.random.default_rng(seed), tokens.quality()
    some = np.concatenate([rng.permutation(mine)[:ROWS] for mine in tokens.groups()])
    rows, m = tokens.with_history(table, own)[some], m[some]
    arrays = {"history": table.astype(np.float32), "mlp16": np.array(MLP16_WEIGHT)}
    offset: dict[str, np.ndarray | float] = {"before": 0.0, "after": MLP16_WEIGHT * rows.rate}
    for name, prior in zip(HEADS, prior_means(), strict=True):
        arrays[name], precision = fit_logistic(lines(getattr(rows, name), m), rows.y, prior, offset=offset[name])
        d = len(prior) // 2
        arrays[f"{name}_precision"] = precision[:d, :d]
    return arrays


def log_odds(arrays: dict[str, np.ndarray], tokens: Tokens) -> np.ndarray:
    """Return both heads' log-odds of acceptance, shape (2, N), on prompts that the weights were not fitted to."""
    rows, m = tokens.with_history(arrays["history"]), tokens.quality()
    found = np.array([lines(getattr(rows, name), m) @ arrays[name] for name in HEADS])
    found[1] += arrays.get("mlp16", 0.0) * rows.rate
    return found


def evaluate_acceptance(arrays: dict[str, np.ndarray], tokens: Tokens) -> dict[str, Any]:
    """Return area under the ROC curve and log loss (nats) of both heads on prompts that they were not fitted to, and
    the loss of the mean rate alone."""
    rate = float(np.clip(tokens.y.mean(), 1e-6, 1 - 1e-6))
    found: dict[str, Any] = {
        "tokens": len(tokens),
        "prompts": len(np.unique(tokens.prompt)),
        "accepted": rate,
        "log_loss_of_mean": float(-(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))),
    }
    for name, eta in zip(HEADS, log_odds(arrays, tokens), strict=True):
        loss = float(np.mean(np.logaddexp(0.0, eta) - tokens.y * eta))
        found[name] = {"auc": auc(eta, tokens.y), "log_loss": loss}
    return found


def auc(score: np.ndarray, y: np.ndarray) -> float | None:
    """Area under the ROC curve, ties counted half; None where only one label occurs."""
    positive = int(y.sum())
    negative = len(y) - positive
    if not positive or not negative:
        return None
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[y > 0].sum() - positive * (positive + 1) / 2) / (positive * negative))
