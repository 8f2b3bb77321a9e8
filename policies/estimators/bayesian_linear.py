"""Bayesian linear regression kept as additive sums, so that the statistics of many workers add up to one posterior.

With features phi, labels y and a Gaussian prior of mean m0 and precision A0 (in units of the noise), the sums over rows
A = sum phi phi^T and r = sum phi (y - phi^T m0) give the posterior mean m0 + (A0 + A)^-1 r. Forgetting multiplies A and
r by ``discount`` per step before the step is added: A <- rho A + phi phi^T + (1 - rho) A0 with the prior counted in.
"""

from __future__ import annotations

import zlib

import numpy as np

from policies.base import PolicyError, State

#: Rows that wait at most before they are folded into the sums.
BUFFER = 4096


class GaussianHead:
    """Posterior over the weights of a linear head of dimension D.

    Parameters
    ----------
    mean : ndarray, shape (D,)
        Prior mean m0.
    precision : ndarray, shape (D, D)
        Prior precision A0 in pseudo-rows: the inverse of the prior covariance over the noise variance.
    discount : float
        rho, what a step's weight is multiplied by at each later step; 1 never forgets.

    Attributes
    ----------
    mean : ndarray, shape (D,)
        Posterior mean, as of the latest :meth:`refresh` or :meth:`merge`.
    """

    def __init__(self, mean: np.ndarray, precision: np.ndarray, discount: float = 1.0) -> None:
        self.prior_mean, self.prior_precision, self.discount = mean.copy(), precision.copy(), discount
        d = len(mean)
        # Column d of the sums is r, so that one product updates both; misc: rows, steps, squared residuals.
        self._total, self._total_misc = np.zeros((d, d + 1)), np.zeros(3)
        self._delta, self._delta_misc, self._delta_count = np.zeros((d, d + 1)), np.zeros(3), 0
        # Rows (phi, y) of the latest steps, not in the sums yet, and how many rows each step has.
        self._rows, self._used, self._lengths = np.empty((BUFFER, d + 1)), 0, list[int]()
        self.refresh()

    @property
    def steps(self) -> float:
        """Steps in the sums, discounted."""
        return float(self._total_misc[1])

    def add(self, phi: np.ndarray, y: np.ndarray, lengths: list[int] | None = None) -> None:
        """Add rows phi (m, D) with labels y (m,) of one step, or of several whose numbers of rows are ``lengths``."""
        m, used = len(y), self._used
        if used + m > BUFFER:
            self.fold()
            used = 0
            if m > BUFFER:
                raise ValueError(f"at most {BUFFER} rows at once, got {m}")
        rows = self._rows[used : used + m]
        rows[:, :-1] = phi
        rows[:, -1] = y
        self._used = used + m
        self._lengths += [m] if lengths is None else lengths

    def fold(self) -> None:
        """Move the latest steps into the sums."""
        steps = len(self._lengths)
        if not steps:
            return
        rows, d = self._rows[: self._used], len(self.prior_mean)
        rows[:, d] -= rows[:, :d] @ self.prior_mean
        keep, count = 1.0, (float(self._used), float(steps))
        if self.discount < 1.0:
            age = self.discount ** np.arange(steps - 1, -1, -1)
            weight = np.repeat(age, self._lengths)
            rows *= np.sqrt(weight)[:, None]
            keep, count = self.discount**steps, (float(weight.sum()), float(age.sum()))
        misc = np.array([*count, float(rows[:, d] @ rows[:, d])])
        block = rows[:, :d].T @ rows
        for total, more in (
            (self._total, block),
            (self._total_misc, misc),
            (self._delta, block),
            (self._delta_misc, misc),
        ):
            total *= keep
            total += more
        self._delta_count += steps
        self._used = 0
        self._lengths.clear()

    @property
    def mean(self) -> np.ndarray:
        """Posterior mean."""
        if self._stale:  # sums were merged since: a learner merges far more often than it looks
            self.refresh()
        return self._mean

    def refresh(self) -> None:
        """Fold, and solve for the posterior."""
        self.fold()
        self._stale = False
        d = len(self.prior_mean)
        A, r = self._total[:, :d], self._total[:, d]
        self._mean: np.ndarray = self.prior_mean + np.linalg.solve(self.prior_precision + A, r)

    def forget(self) -> None:
        """Return to the prior; sums that were not handed out yet are dropped too."""
        for array in (self._total, self._total_misc, self._delta, self._delta_misc):
            array[:] = 0.0
        self._used = self._delta_count = 0
        self._lengths.clear()
        self.refresh()

    def state(self) -> State:
        """The sums, as arrays."""
        self.fold()
        return {"head.sums": self._total.copy(), "head.misc": self._total_misc.copy()}

    def load(self, state: State) -> None:
        """Restore :meth:`state`; sums that were not handed out yet are dropped."""
        sums, misc = check_array(state, "head.sums", self._total.shape), check_array(state, "head.misc", (3,))
        self.forget()
        self._total[:], self._total_misc[:] = sums, misc
        self.refresh()

    def take_delta(self) -> State:
        """The sums over the steps since the last call, and their number."""
        self.fold()
        delta = {
            "head.sums": self._delta,
            "head.misc": self._delta_misc,
            "head.count": np.array(float(self._delta_count)),
        }
        self._delta, self._delta_misc, self._delta_count = np.zeros_like(self._delta), np.zeros(3), 0
        return delta

    def merge(self, delta: State) -> None:
        """Add sums that another copy handed out, as if its steps had come after this one's."""
        if "head.sums" not in delta:
            return
        self.fold()
        sums, misc = check_array(delta, "head.sums", self._total.shape), check_array(delta, "head.misc", (3,))
        keep = self.discount ** float(check_array(delta, "head.count", ()))
        self._total *= keep
        self._total += sums
        self._total_misc *= keep
        self._total_misc += misc
        self._stale = True


def fingerprint(*arrays: np.ndarray) -> np.ndarray:
    """Return a number, shape (), that tells what sums are relative to: those of another start do not fit."""
    return np.array(float(zlib.crc32(b"".join(np.ascontiguousarray(a, dtype=float).tobytes() for a in arrays))))


def check_start(state: State, key: str, own: np.ndarray) -> None:
    """Raise :class:`PolicyError` for sums of another start; those of versions that did not say are let through."""
    if key in state and check_array(state, key, ()) != own:
        raise PolicyError(f"'{key}' says other arms or weights than these: a policy made with the same ones fits")


def check_array(state: State, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array of a state; raises :class:`PolicyError` if it is missing, misshapen or not finite."""
    if key not in state:
        raise PolicyError(f"the state lacks '{key}'; it was saved by another policy or version")
    value = np.asarray(state[key])
    if value.shape != shape:
        raise PolicyError(
            f"the state's '{key}' has shape {value.shape}, expected {shape}: load it into the same policy"
        )
    if value.dtype.kind not in "fiub" or not np.isfinite(value).all():
        raise PolicyError(f"the state's '{key}' must hold finite numbers only")
    return value
