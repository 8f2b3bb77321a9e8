"""The two schedules of Hugging Face transformers' assisted generation.

Source: ``AssistedCandidateGenerator.update_candidate_strategy`` and ``ConfidenceCriteria`` in transformers 5.23,
``generation/candidate_generator.py`` and ``generation/stopping_criteria.py``.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.base import CONFIDENCE, Context, Decision, Draft, Outcome, Policy, PolicyError, State
from policies.estimators.bayesian_linear import check_array


class Heuristic(Policy):
    """Two tokens more after a draft that was accepted whole, else one fewer, but at least one.

    Parameters
    ----------
    start : int
        Gamma of the first step, transformers' ``num_assistant_tokens`` (which is 20 there by now if nothing sets it).
    transient : bool
        Start afresh with every prompt (``heuristic_transient``) instead of carrying on (``heuristic``).
    """

    summary = "transformers' heuristic schedule: gamma + 2 after a full acceptance, else gamma - 1"
    learns = True
    positional: ClassVar[str] = "start"

    def __init__(self, *, start: int = 5, transient: bool = False, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 1 <= start <= 1000:
            raise PolicyError(f"start must be from 1 to 1000, got {start}")
        self.start, self.transient, self.gamma = start, transient, start

    def begin(self, context: Context) -> None:
        if self.transient:
            self.gamma = self.start

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.gamma, context.max_gamma))

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id) or not outcome.drafted:
            return
        if outcome.accepted == outcome.drafted:
            self.gamma += 2
        else:
            self.gamma = max(1, self.gamma - 1)

    def state_dict(self) -> State:
        return {"gamma": np.array(self.gamma)}

    def load_state_dict(self, state: State) -> None:
        self.gamma = int(check_array(state, "gamma", ()))


class Confidence(Policy):
    """Stop after a token that the draft was not confident of, at a threshold tuned on what was accepted so far.

    After each step the draft's probabilities and matches, up to and including the first rejection, are logged; with
    more than five of them and both outcomes seen, the threshold becomes the one on the ROC curve that minimises false
    positives + 3 * false negatives (as rates). As in transformers, every prompt starts afresh.

    Parameters
    ----------
    threshold : float
        Confidence threshold to start from.
    cap : int
        Most tokens to draft; transformers' default of 20 is cut to what a step allows.
    """

    summary = "transformers' confidence threshold, tuned on the ROC curve (its default schedule)"
    learns = True
    positional: ClassVar[str] = "threshold"

    def __init__(self, *, threshold: float = 0.4, cap: int = 20, seed: int = 0, worker: int = 0) -> None:
        super().__init__(seed=seed, worker=worker)
        if not 0 <= threshold <= 1 or cap < 1:
            raise PolicyError(f"threshold must be from 0 to 1 and cap at least 1, got {threshold} and {cap}")
        self.start, self.cap = threshold, cap
        self._forget()

    def _forget(self) -> None:
        self.threshold = self.start
        # Probabilities in falling order, with their matches.
        self._probs, self._match = np.empty(0), np.empty(0)

    def begin(self, context: Context) -> None:
        self._forget()

    def decide(self, context: Context) -> Decision:
        return Decision(self.new_id(), min(self.cap, context.max_gamma), stops=True)

    def proceed(self, decision: Decision, draft: Draft) -> bool:
        return bool(draft.signals.item(draft.drafted - 1, CONFIDENCE) >= self.threshold)

    def learn(self, decision: Decision, outcome: Outcome) -> None:
        if not self.first_time(decision.id):
            return
        confidence = outcome.signals[: outcome.tested, CONFIDENCE]
        for i, q in enumerate(confidence.tolist()):
            at = int(np.searchsorted(-self._probs, -q))
            self._probs = np.insert(self._probs, at, q)
            self._match = np.insert(self._match, at, 1.0 if i < outcome.accepted else 0.0)
        matches = self._match.sum()
        if len(self._probs) > 5 and 0 < matches < len(self._match):
            self.threshold = best_threshold(self._probs, self._match)

    def state_dict(self) -> State:
        return {"threshold": np.array(self.threshold), "probs": self._probs.copy(), "match": self._match.copy()}

    def load_state_dict(self, state: State) -> None:
        length = len(np.atleast_1d(state.get("probs", np.empty(0))))
        probs, match = check_array(state, "probs", (length,)), check_array(state, "match", (length,))
        if np.shape(state.get("threshold", probs)) != ():
            raise PolicyError("the state lacks one number 'threshold'; it was saved by another policy or version")
        self.threshold, self._probs, self._match = float(state["threshold"]), probs.copy(), match.copy()


def best_threshold(probs: np.ndarray, match: np.ndarray) -> float:
    """Return the ROC threshold with the least fpr + 3 fnr; ``probs`` in falling order, both outcomes present.

    The curve starts at threshold infinity, where nothing is predicted positive, as scikit-learn's ``roc_curve`` does;
    of equal costs the largest threshold wins.
    """
    last = np.append(np.nonzero(np.diff(probs))[0], len(probs) - 1)  # the last of each run of equal probabilities
    true = np.cumsum(match)[last]
    false = last + 1 - true
    costs = false / false[-1] + 3.0 * (1.0 - true / true[-1])
    best = int(costs.argmin())
    return float("inf") if costs[best] >= 3.0 else float(probs[last[best]])
