"""ik_llama.cpp's autotune (``--spec-autotune``), for a draft model, as of commit 8337e4cd (August 2026).

Source: ``common/spec-tuner.cpp``, ``common/speculative.cpp`` and ``examples/server/server-context.cpp``; pull request
ikawrakow/ik_llama.cpp#1595.

Three coordinates are tuned apart: ``n_max`` (1 to 16), ``p_min`` (eleven values from 0 to 0.95) and ``n_min`` (0 to
6), each with the user's value added where the grid lacks it. Before every draft each takes its best value, or with
probability 0.15 a random one. The reward of a step, for all three, is its tokens per second (0 where it took at most
0.1 ms). A value is worth the mean of its rewards. Before there is data the first value of each counts as the best one.
Thirty steps in a row below 0.7 of the average rate (a new step counts 0.05) clear all scores and return to the user's
values; the next fifty steps cannot.

A draft ends before the first token whose confidence is below ``p_min``, but holds one token at least. A draft shorter
than ``n_min`` is not verified, and teaches nothing.

Different here: one tuner learns from all sequences, where ik_llama.cpp has one per slot of the server. Steps whose
seconds are not known teach nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from policies.base import CONFIDENCE, MAX_GAMMA, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.estimators.bayesian_linear import check_array

EPSILON = 0.15
RATE, DROP = 0.05, 0.3
RESET_AFTER, COOLDOWN = 30, 50
SHORTEST = 1e-4


class _Coordinate:
    """Values of one setting, with the mean reward of each."""

    def __init__(self, values: list[float], own: float) -> None:
        if not any(abs(value - own) < 1e-6 for value in values):
            values = sorted([*values, own])
        self.values = values
        self.own = min(range(len(values)), key=lambda i: abs(values[i] - own))
        self.best = 0
        self.means, self.counts = np.zeros(len(values)), np.zeros(len(values))

    def choose(self, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self.values))) if rng.random() < EPSILON else self.best

    def update(self, i: int, reward: float) -> None:
        self.counts[i] += 1.0
        self.means[i] += (reward - self.means[i]) / self.counts[i]
        self.best = int(np.where(self.counts > 0, self.means, -np.inf).argmax())

    def reset(self) -> None:
        self.means[:], self.counts[:], self.best = 0.0, 0.0, self.own


class IkAutotune(Policy):
    """Epsilon-greedy over n_max, p_min and n_min, one coordinate at a time.

    Parameters
    ----------
    n_max, n_min : int
        The user's ``--draft-max`` and ``--draft-min``.
    p_min : float
        The user's ``--draft-p-min``.
    """

    summary = "ik_llama.cpp's autotune: epsilon-greedy over n_max, p_min and n_min by tokens per second"
    learns = True
    positional: ClassVar[str] = "n_max"

    def __init__(self, *, n_max: int = 16, p_min: float = 0.75, n_min: int = 0, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 1 <= n_max <= MAX_GAMMA or not 0 <= p_min <= 0.95 or not 0 <= n_min <= 6:
            raise PolicyError(
                f"need n_max from 1 to {MAX_GAMMA}, p_min from 0 to 0.95 and n_min from 0 to 6, "
                f"got {n_max}, {p_min} and {n_min}"
            )
        self.arms = tuple(range(1, MAX_GAMMA + 1))
        self.n_max = _Coordinate([float(n) for n in self.arms], n_max)
        self.p_min = _Coordinate([0.95 * i / 10 for i in range(11)], p_min)
        self.n_min = _Coordinate([float(n) for n in range(7)], n_min)
        self.coordinates = (self.n_max, self.p_min, self.n_min)
        self.rate, self.low, self.wait, self.resets = 0.0, 0, 0, 0

    def pmf(self, context: Context) -> np.ndarray:
        """Probability of each gamma from 1 to 16; where a step allows fewer, of what is left of them."""
        p = np.full(len(self.arms), EPSILON / len(self.arms))
        p[self.n_max.best] += 1.0 - EPSILON
        most = max(context.max_gamma, 1)
        found = np.zeros(len(self.arms))
        found[:most] = p[:most]
        found[min(most, len(p)) - 1] += p[most:].sum()
        return found

    def decide(self, context: Context) -> Decision:
        chosen = tuple(coordinate.choose(self.rng) for coordinate in self.coordinates)
        n_max, p_min, n_min = (c.values[i] for c, i in zip(self.coordinates, chosen, strict=True))
        gamma = min(int(n_max), context.max_gamma)
        propensity = min(float(self.pmf(context)[gamma - 1]), 1.0) if gamma else 1.0  # sums round up
        features = chosen, p_min, min(n_min, n_max)
        return Decision(self.new_id(), gamma, ask_per_token=True, propensity=propensity, features=features)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(draft.signals.item(draft.drafted - 1, CONFIDENCE) >= decision.features[1])

    def submit(self, decision: Decision, draft: Draft) -> int:
        _, p_min, n_min = decision.features
        kept = max(draft.drafted - (draft.signals.item(draft.drafted - 1, CONFIDENCE) < p_min), 1)
        return kept if kept >= n_min else 0

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id) or decision.features is None or not outcome.drafted:
            return
        if not 0.0 < outcome.seconds < 1e9:
            return
        reward = (outcome.accepted + 1.0) / outcome.seconds if outcome.seconds > SHORTEST else 0.0
        for coordinate, i in zip(self.coordinates, decision.features[0], strict=True):
            coordinate.update(i, reward)
        if self.wait:
            self.wait -= 1
        elif self.rate > 0.0:
            self.low = self.low + 1 if reward < self.rate * (1.0 - DROP) else 0
            if self.low >= RESET_AFTER:
                self._reset()
                return
        self.rate = RATE * reward + (1.0 - RATE) * self.rate if self.rate > 0.0 else reward

    def _reset(self) -> None:
        """The text has changed: forget what was tried."""
        for coordinate in self.coordinates:
            coordinate.reset()
        self.rate, self.low, self.wait = 0.0, 0, COOLDOWN
        self.resets += 1

    def state_dict(self) -> State:
        tables = {f"arms.{i}": np.array([c.means, c.counts]) for i, c in enumerate(self.coordinates)}
        rest = [*(c.best for c in self.coordinates), self.rate, self.low, self.wait, self.resets]
        return tables | {"autotune": np.array(rest, dtype=float)}

    def load_state_dict(self, state: State) -> None:
        tables = [check_array(state, f"arms.{i}", (2, len(c.values))) for i, c in enumerate(self.coordinates)]
        *best, rate, low, wait, resets = check_array(state, "autotune", (7,)).tolist()
        if not all(0 <= i < len(c.values) for i, c in zip(best, self.coordinates, strict=True)):
            raise PolicyError(
                f"the state's best values {best} do not exist here: load it with the options it was saved with"
            )
        for coordinate, table, i in zip(self.coordinates, tables, best, strict=True):
            coordinate.means, coordinate.counts = table.copy()
            coordinate.best = int(i)
        self.rate, self.low, self.wait, self.resets = rate, int(low), int(wait), int(resets)

    def info(self) -> dict[str, Any]:
        names = ("n_max", "p_min", "n_min")
        return {name: c.values[c.best] for name, c in zip(names, self.coordinates, strict=True)} | {
            "resets": self.resets
        }
