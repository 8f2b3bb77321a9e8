"""Goodput, and ratios of goodputs with a bootstrap over prompts.

A goodput is Σtokens/Σseconds, never a mean of per-prompt speeds. Steps of one prompt are correlated, so the unit that
is resampled is the prompt, and two policies are compared on the same resampled prompts (Efron and Tibshirani, *An
Introduction to the Bootstrap*, 1993, chapters 13 and 16: percentile intervals and achieved significance levels).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000
_CELLS = 4_000_000  # indices held at once, so that thousands of prompts do not take gigabytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % bootstrap interval.

    Attributes
    ----------
    value, low, high : float
        Point estimate and percentile interval; the interval is NaN with fewer than two prompts.
    p_value : float
        Two-sided, against a ratio of 1; NaN where it has no meaning.
    prompts : int
        Number of prompts behind it.
    """

    value: float
    low: float
    high: float
    p_value: float
    prompts: int

    def text(self, digits: int = 2) -> str:
        """``value [low, high]``, the value alone where there is no interval."""
        if math.isnan(self.low):
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    @property
    def above(self) -> bool:
        """True if the whole interval lies above 1."""
        return self.low > 1.0

    @property
    def below(self) -> bool:
        """True if the whole interval lies below 1."""
        return self.high < 1.0


def goodput(tokens: ArrayLike, seconds: ArrayLike) -> float:
    """Return Σtokens/Σseconds in tokens per second; NaN if no time has passed.

    >>> goodput([10, 30], [1.0, 1.0])
    20.0
    """
    total = float(np.sum(seconds))
    return float(np.sum(tokens)) / total if total > 0 else math.nan


def bootstrap_goodput(
    tokens: ArrayLike, seconds: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Return the goodput of one policy with an interval over prompts.

    Parameters
    ----------
    tokens, seconds : array_like, shape (prompts,)
        Tokens produced and seconds taken, one entry per prompt.
    resamples, seed : int
        Number of bootstrap samples, and the seed that picks them.
    level : float
        Coverage of the interval.

    Raises
    ------
    ValueError
        If shapes differ, or a prompt took no time or gave no token.
    """
    t, s = _columns(tokens, seconds)
    draws = np.empty(0)
    if len(t) > 1:
        draws = np.concatenate([t[i].sum(1) / s[i].sum(1) for i in _samples(len(t), resamples, seed)])
    low, high = _interval(draws, level)
    return Estimate(goodput(t, s), low, high, math.nan, len(t))


def paired_ratio(
    tokens: ArrayLike,
    seconds: ArrayLike,
    base_tokens: ArrayLike,
    base_seconds: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Return the ratio of two goodputs over the same prompts, with an interval and a p-value.

    Parameters
    ----------
    tokens, seconds : array_like, shape (prompts,)
        Of the policy in question.
    base_tokens, base_seconds : array_like, shape (prompts,)
        Of the policy that it is compared with, prompts in the same order.
    resamples, seed, level
        As for :func:`bootstrap_goodput`.

    Returns
    -------
    Estimate
        ``p_value`` is twice the smaller share of resampled ratios on either side of 1, counting the observed sample
        once so that it is never zero.

    Raises
    ------
    ValueError
        If shapes differ, or a prompt took no time or gave no token.
    """
    t, s = _columns(tokens, seconds)
    bt, bs = _columns(base_tokens, base_seconds)
    if len(t) != len(bt):
        raise ValueError(f"a paired ratio needs the same prompts on both sides, got {len(t)} and {len(bt)}")
    value = goodput(t, s) / goodput(bt, bs)
    if len(t) < 2:
        return Estimate(value, math.nan, math.nan, math.nan, len(t))
    sums = [[x[i].sum(1) for x in (t, s, bt, bs)] for i in _samples(len(t), resamples, seed)]
    # Products in this order make a comparison of a policy with itself exactly 1 in every resample.
    draws = np.concatenate([(t_ * bs_) / (bt_ * s_) for t_, s_, bt_, bs_ in sums])
    low, high = _interval(draws, level)
    near = 1e-12
    tail = min(np.count_nonzero(draws <= 1 + near), np.count_nonzero(draws >= 1 - near))
    return Estimate(value, low, high, min(1.0, 2.0 * (tail + 1) / (len(draws) + 1)), len(t))


def mean_gain(
    ours: np.ndarray,
    theirs: np.ndarray,
    strata: Sequence[str],
    *,
    resamples: int = 2_000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Estimate]:
    """Return how many times as fast we were: a geometric mean over cells, with its interval over prompts.

    Both produced the same tokens. A resample draws prompts anew within each stratum, the same ones for all cells.

    Parameters
    ----------
    ours, theirs : ndarray, shape (C, P, B)
        Seconds of each cell and prompt; zero where a cell has not met a prompt.
    strata : sequence of str
        The stratum of each prompt; a cell has met all or none of its prompts.
    resamples, seed, level
        As for :func:`bootstrap_goodput`.

    Returns
    -------
    list of Estimate
        B of them, without p-values.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(strata)))
    for stratum in dict.fromkeys(strata):
        own = np.flatnonzero(np.array(strata) == stratum)
        counts[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), resamples)
    value = _geometric_mean(theirs.sum(axis=1) / ours.sum(axis=1))
    above, below = (np.einsum("rp,cpb->crb", counts, seconds, optimize=True) for seconds in (theirs, ours))
    with np.errstate(invalid="ignore"):  # a resample may hold none of the prompts that a cell began with
        draws = _geometric_mean(above / below)
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    if len(strata) < 2:
        low = high = np.full_like(value, math.nan)
    rows = np.column_stack([value, low, high]).tolist()
    return [Estimate(middle, least, most, math.nan, len(strata)) for middle, least, most in rows]


def _geometric_mean(ratios: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.exp(np.log(ratios).mean(axis=0))
    return found


def _columns(tokens: ArrayLike, seconds: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    t, s = np.asarray(tokens, float), np.asarray(seconds, float)
    if t.ndim != 1 or t.shape != s.shape or not len(t):
        raise ValueError(f"tokens and seconds must be vectors with one entry per prompt, got {t.shape} and {s.shape}")
    if not (np.isfinite(t).all() and np.isfinite(s).all() and (t > 0).all() and (s > 0).all()):
        raise ValueError("every prompt needs a positive, finite number of tokens and of seconds")
    return t, s


def _samples(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield which prompts were drawn, as blocks of shape (resamples, n) made from one stream of random numbers."""
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // n)
    for i in range(0, resamples, block):
        yield rng.integers(0, n, (min(block, resamples - i), n))


def _interval(draws: np.ndarray, level: float) -> tuple[float, float]:
    if not len(draws):
        return math.nan, math.nan
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
