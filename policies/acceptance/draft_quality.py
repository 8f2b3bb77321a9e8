"""How good the draft is at each compression level: one number per level, found while decoding.

What a draft's signals say about a token's acceptance depends on how good the draft is on the whole: a weak draft that
disagrees with an n-gram lookup is mostly wrong, a strong one mostly right. So every weight of
:mod:`policies.acceptance.model` is a line over one number m, learned offline from pairs of models of different quality:
the log-odds of a token's acceptance are x.w + m x.v + m^2 q. Online, m is what explains a level's acceptances best: a
logistic regression with one coefficient, by Newton's method, whose sums forget exponentially and add up over workers.
Where acceptances show that the draft must be another one by now, what was known of it is dropped at once. A text that
is hard, or easy, throughout looks the same for a while. So what was dropped is kept aside until the tokens after that
say which m explains them, and comes back if it is the former.
"""

from __future__ import annotations

import numpy as np

from policies.base import PolicyError, State
from policies.estimators.bayesian_linear import check_array

#: Mean and precision of m before there is data, from the pairs that the shipped weights were fitted to: it was -0.1 for
#: a draft that is right at 0.43 of the tokens, 0.5 at 0.80, and 1.6 for one that is always right.
MEAN, PRECISION = 0.2, 3.0
LEAST, MOST = -1.0, 2.0
#: How far above the likeliest m decisions take it to be, in standard deviations.
HOPE = 1.0
#: A draft is another one where log-odds higher, or lower, by SHIFT explain its latest tokens e^ALARM times as well.
SHIFT, ALARM = 2.0, 10.0
#: What was dropped comes back where it explains the latest tokens e^BACK times as well as what took its place.
BACK = 5.0
#: Least variance of a tested token: predictions may be surer than anything is.
DOUBT = 0.01


def quality(accepted: float, labelled: float) -> float:
    """Return m of a draft of which ``accepted`` of ``labelled`` tokens were right, for training."""
    p = (accepted + 5.0) / (labelled + 10.0)
    return float(np.log(p / (1.0 - p))) / 3.0


class DraftQuality:
    """m of each level, and the sums that it comes from.

    Parameters
    ----------
    discount : float
        Forgetting per step.
    """

    def __init__(self, discount: float) -> None:
        self.discount = discount
        self.forget()

    def forget(self) -> None:
        """Return to the prior."""
        self._sums: dict[str, np.ndarray] = {}
        self._delta: dict[str, np.ndarray] = {}
        self._count = 0
        self._runs: dict[str, tuple[float, float]] = {}
        # By level: information and score that were dropped, and how much better they explain what came since.
        self._former: dict[str, list[float]] = {}

    def surprised(self, level: str, surplus: float, variance: float) -> bool:
        """Note a step: how many more of its tokens were accepted than was predicted, and the variance of that number.

        Returns True, and drops what is known of the level, where the draft is another one: Page's cumulative sums
        (Biometrika, 1954) of the log-likelihood ratio, for a better draft and for a worse one. A copy that has dropped
        something does not make those drop it with which it shares.
        """
        up, down = self._runs.get(level, (0.0, 0.0))
        cost = 0.5 * SHIFT * SHIFT * variance
        up, down = up + SHIFT * surplus - cost, down - SHIFT * surplus - cost
        up, down = up if up > 0.0 else 0.0, down if down > 0.0 else 0.0
        found = up > ALARM or down > ALARM
        self._runs[level] = (0.0, 0.0) if found else (up, down)
        if found:
            if level in self._sums:  # of two that were dropped, the one that more is known of is kept aside
                dropped, aside = self._sums[level].tolist(), self._former.get(level, [0.0, 0.0])[:2]
                self._former[level] = [*max(dropped, aside), 0.0]
            for table in (self._sums, self._delta):
                table.pop(level, None)
        return found

    def formers(self) -> dict[str, float]:
        """Return m of the drafts that were dropped and may come back, by level."""
        return {level: (PRECISION * MEAN + b) / (PRECISION + a) for level, (a, b, _) in self._former.items()}

    def compare(self, level: str, better: float) -> None:
        """Note by how much the former draft's m explains a level's latest tokens better, as a log-likelihood ratio."""
        former = self._former[level]
        former[2] = max(former[2] + better, 0.0)
        if former[2] > BACK:
            self._sums[level] = np.array(former[:2])
            del self._former[level]

    def value(self, level: str) -> float:
        """Return m of a level, some way above what is likeliest: a draft that is taken for worse than it is would not
        be asked for the tokens that prove it. A level starts from what is known of the others."""
        others = [self._likeliest(name, MEAN) for name in self._sums if name != level]
        m = self._likeliest(level, sum(others) / len(others) if others else MEAN)
        found: float = min(max(m + HOPE * (PRECISION + self.information(level)) ** -0.5, LEAST), MOST)
        return found

    def information(self, level: str) -> float:
        """Return how much is known of a level beyond the prior, in the units of ``PRECISION``."""
        return float(self._sums[level][0]) if level in self._sums else 0.0

    def _likeliest(self, level: str, mean: float) -> float:
        information, score = self._sums.get(level, (0.0, 0.0))
        return float((PRECISION * mean + score) / (PRECISION + information))

    def add(self, sums: dict[str, np.ndarray], steps: int) -> None:
        """Add (information, score) by level over the latest ``steps`` steps, discounted to the last of them."""
        keep = self.discount**steps
        for table in (self._sums, self._delta):
            _add(table, sums, keep)
        self._count += steps

    def state(self) -> State:
        """The sums, as arrays."""
        runs = {f"surprise.{level}": np.array(run) for level, run in self._runs.items()}
        former = {f"surprise_former.{level}": np.array(found) for level, found in self._former.items()}
        return {f"quality.{level}": sums.copy() for level, sums in self._sums.items()} | runs | former

    def load(self, state: State) -> None:
        """Restore :meth:`state`. What was surprising here is kept for levels of which the state does not tell, as that
        of merged sums, which watched no steps themselves."""
        sums = _read(state)
        runs = {key: check_array(state, key, (2,)).tolist() for key in state if key.startswith("surprise.")}
        former = {key: check_array(state, key, (3,)).tolist() for key in state if key.startswith("surprise_former.")}
        kept, aside = self._runs, self._former
        self.forget()
        self._sums = sums
        self._runs = kept | {key.removeprefix("surprise."): (run[0], run[1]) for key, run in runs.items()}
        self._former = aside | {key.removeprefix("surprise_former."): found for key, found in former.items()}

    def take_delta(self) -> State:
        """The sums since the last call."""
        delta: State = {f"quality.{level}": sums for level, sums in self._delta.items()}
        delta["quality_steps"] = np.array(float(self._count))
        self._delta, self._count = {}, 0
        return delta

    def merge(self, delta: State) -> None:
        """Add what another copy handed out, as if its steps had come after this one's."""
        _add(self._sums, _read(delta), self.discount ** _steps(delta))


def _add(table: dict[str, np.ndarray], more: dict[str, np.ndarray], keep: float) -> None:
    for level in table:
        table[level] = table[level] * keep
    for level, sums in more.items():
        table[level] = table[level] + sums if level in table else sums.copy()


def _read(state: State) -> dict[str, np.ndarray]:
    found = {}
    for key in state:
        if key.startswith("quality."):
            sums = found[key.removeprefix("quality.")] = check_array(state, key, (2,)).astype(float)
            if sums[0] < 0.0:
                raise PolicyError(f"the state's '{key}' must not begin with a negative number")
    return found


def _steps(delta: State) -> float:
    return float(check_array(delta, "quality_steps", ())) if "quality_steps" in delta else 0.0
