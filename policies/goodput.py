"""`goodput`: predicts the acceptance of every token, and drafts on while the next tokens are worth their seconds.

With k tokens drafted whose joint survival estimate is S_k, and p the acceptance predicted for the next token, drafting
m more is worth S_k (p + p^2 + ... + p^m) tokens and costs lambda (m t_d + T_v(k+m+1) - T_v(k+1)). The policy goes on if
that pays for any m. For m = 1 alone this is the one-step-ahead rule, optimal while survival falls and costs do not; the
look ahead sees past a verify that is dear for two tokens and no dearer for eight. Gamma 0 is the same rule at k = 0.
Drafting paid for, the tail is submitted only where its survival pays for the wider verify.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from policies.base import MAX_GAMMA, Context, Decision, Outcome, PolicyError, State
from policies.gaussian import check_array
from policies.hazard import START, Hazard, after_features, before_features, log_odds, probability, token_features
from policies.learned import CostAware
from policies.level_cost import LevelCosts
from policies.mlp16 import FADE

STATE_FORMAT = 1
BINS = 32
#: G[b, m - 1] = p + p^2 + ... + p^m at the middle of bin b.
_GAIN = np.cumsum(((np.arange(BINS) + 0.5) / BINS)[:, None] ** np.arange(1, MAX_GAMMA + 1), axis=1)
_K, _M = np.arange(MAX_GAMMA)[:, None], np.arange(1, MAX_GAMMA + 1)
_INSIDE = _K + _M <= MAX_GAMMA
_WIDTH = np.minimum(_K + _M, MAX_GAMMA)
# Layout of Decision.features: what the step started from, tokens described so far, their joint survival after each.
_COUNT, _SURVIVAL = START, START + 1


class Goodput(CostAware):
    """Token-level stopping by predicted acceptance and measured seconds.

    Parameters
    ----------
    acceptance : str
        An npz of acceptance weights, see :class:`~policies.hazard.Hazard`; the shipped ones by default,
        ``none`` for a cold start.
    strength : float
        How many tested tokens the prior is worth at most.
    discount : float
        Forgetting per step, 0 < rho <= 1.
    refresh : int
        Steps between updates of the weights that decisions use.
    cap : int
        Most tokens to draft.
    objective, cost_half_life, seed, worker
        As in :class:`~policies.learned.CostAware`.
    """

    summary = "stops token by token where predicted acceptance no longer pays for the measured seconds; learns both"
    learns = True
    guarded: ClassVar[bool] = True

    def __init__(
        self,
        *,
        acceptance: str = "",
        strength: float = 500.0,
        discount: float = 0.9995,
        refresh: int = 16,
        cap: int = MAX_GAMMA,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if refresh < 1 or not 0 <= cap <= MAX_GAMMA:
            raise PolicyError(f"refresh must be at least 1 and cap from 0 to {MAX_GAMMA}, got {refresh} and {cap}")
        self.every, self.cap = refresh, cap
        self.hazard = Hazard(acceptance, strength, discount)
        self._tables: dict[str, tuple[int, list[list[float]]]] = {}
        self._drafted_at = 0

    def begin(self, context: Context) -> None:
        self._drafted_at = 0

    def table(self, level: str) -> list[list[float]]:
        """Least survival S_k that pays for drafting on, by k and by the bin of p."""
        costs = self.costs.level(level)
        version, table = self._tables.get(level, (-1, []))
        if version != costs.version:
            table = thresholds(costs).tolist() if self.timed else [[0.0] * BINS] * MAX_GAMMA
            self._tables[level] = costs.version, table
        return table

    def _start(self, context: Context) -> list[float]:
        """Describe the context; while nothing is drafted its lagged part fades, see :class:`~policies.mlp16.Mlp16`."""
        whole = 1.0 if 0 < context.last_drafted == context.last_accepted else 0.0
        values = [
            2.0 * context.acceptance - 1.0,
            whole,
            log_odds(context.mean_confidence),
            0.25 * context.mean_entropy,
            0.0,
        ]
        idle = context.step - self._drafted_at
        if context.last_drafted or idle <= 0:
            self._drafted_at = context.step
            return values
        f = FADE**idle
        return [f * values[0], whole, f * values[2], 0.5 + f * (values[3] - 0.5), 0.0]

    def decide(self, context: Context) -> Decision:
        start = self._start(context)
        gamma = min(self.cap, context.max_gamma)
        if gamma:
            p = probability(self.hazard.before, before_features(start, None, 0))
            if self.table(context.level)[0][min(int(p * BINS), BINS - 1)] > 1.0:
                gamma = 0
        features = np.zeros(_SURVIVAL + MAX_GAMMA + 1)
        features[:START] = start
        features[_SURVIVAL] = 1.0
        self._level = context.level
        return Decision(self.new_id(), gamma, gamma > 0, 1.0, self.version, features)

    def _describe(self, decision: Decision, drafted: int, signals: np.ndarray) -> tuple[list[float], tuple[float, ...]]:
        """Extend the joint survival to ``drafted`` tokens; return (the step's start, the last token's description)."""
        f = decision.features
        assert f is not None
        start, done = f[:START].tolist(), int(f[_COUNT])
        previous = token_features(signals[done - 1].tolist()) if done else None
        for j in range(done, drafted):
            own = token_features(signals[j].tolist())
            p = probability(self.hazard.after, after_features(start, own, previous, j))
            f[_SURVIVAL + j + 1] = f[_SURVIVAL + j] * p
            previous = own
        f[_COUNT] = drafted
        assert previous is not None
        return start, previous

    def proceed(self, decision: Decision, drafted: int, signals: np.ndarray) -> bool:
        start, previous = self._describe(decision, drafted, signals)
        p = probability(self.hazard.before, before_features(start, previous, drafted))
        survival = decision.features.item(_SURVIVAL + drafted)  # type: ignore[union-attr]
        return survival >= self.table(self._level)[drafted][min(int(p * BINS), BINS - 1)]

    def submit(self, decision: Decision, drafted: int, signals: np.ndarray) -> int:
        self._describe(decision, drafted, signals)
        if not self.timed:
            return drafted
        survival = decision.features[_SURVIVAL + 1 : _SURVIVAL + 1 + drafted]  # type: ignore[index]
        costs = self.costs.level(self._level)
        value = np.cumsum(survival) - costs.rate * (costs.verify[1 : drafted + 1] - costs.verify[0])
        best = int(value.argmax())
        return best + 1 if value[best] > 0.0 else 0

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        f = decision.features
        drafted = outcome.drafted if f is None else max(int(f[_COUNT]), outcome.drafted)
        self.costs.observe(outcome, drafted)
        if f is None or not outcome.tested:
            return
        self.hazard.add(f[:START].tolist(), outcome)
        # Early steps move the weights most, and rows are linearised at the weights in use: start with short waits.
        if self.hazard.pending >= min(self.every, 1 + self.hazard.heads[0].steps // 8):
            self.hazard.refresh()
            self.version += 1

    def state_dict(self) -> State:
        return {"goodput.format": np.array(STATE_FORMAT)} | self.hazard.state() | super().state_dict()

    def load_state_dict(self, state: State) -> None:
        if int(check_array(state, "goodput.format", ())) != STATE_FORMAT:
            raise PolicyError(f"the state is not of format {STATE_FORMAT} of goodput: it was saved by another version")
        self.hazard.load(state)
        super().load_state_dict(state)
        self._tables.clear()
        self.version += 1

    def take_delta(self) -> State:
        return self.hazard.take_delta() | super().take_delta()

    def merge(self, delta: State) -> None:
        self.hazard.merge(delta)
        super().merge(delta)
        self.version += 1

    def sync(self, state: State) -> None:
        """Take over merged statistics, and add again what was learnt here since the last :meth:`take_delta`."""
        delta = self.take_delta()
        self.load_state_dict(state)
        self.merge(delta)
        self.hazard.restore_delta(delta)


def thresholds(costs: LevelCosts) -> np.ndarray:
    """Least survival that pays for drafting on, shape (16, BINS): min over m of lambda * cost / (p + ... + p^m)."""
    verify = costs.verify
    cost = costs.rate * (_M * costs.draft + verify[_WIDTH] - verify[:MAX_GAMMA, None])
    cost[0] += costs.rate * costs.first
    cost[~_INSIDE] = np.inf
    return (cost[:, None, :] / _GAIN).min(axis=2)
